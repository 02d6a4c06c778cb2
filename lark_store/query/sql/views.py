"""The views that people query, each with what its columns mean: help, shell and docs are made from this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_TIME = "TIMESTAMP WITH TIME ZONE"


@dataclass(frozen=True)
class Column:
    """A column: its DuckDB type and what it means, with its unit."""

    type: str
    meaning: str


@dataclass(frozen=True)
class View:
    """A view: what a row of it is, its columns in their order, and the SELECT that makes it."""

    meaning: str
    columns: dict[str, Column]
    sql: str


def _columns(type_: str, **meanings: str) -> dict[str, Column]:
    """Return columns of one type."""
    return {name: Column(type_, meaning) for name, meaning in meanings.items()}


def _text(**meanings: str) -> dict[str, Column]:
    return _columns("VARCHAR", **meanings)


def _whole(**meanings: str) -> dict[str, Column]:
    return _columns("BIGINT", **meanings)


def _double(**meanings: str) -> dict[str, Column]:
    return _columns("DOUBLE", **meanings)


def _float(**meanings: str) -> dict[str, Column]:
    return _columns("FLOAT", **meanings)


_ADDED = _columns(_TIME, created_at="when it was added, UTC")
_STATUS = _text(status="running, done, interrupted, failed or superseded")
_SKETCHER = _text(sketcher="name of the sketcher")
_CHECKPOINT = _text(checkpoint="name of the checkpoint of the samples' gradients")
_GROUP = _text(source="name of the samples' source", variant="name of the samples' format variant")
_SAMPLE = _text(sample_id="id of the sample within its source")
_INGEST_RUN = _whole(ingest_run="number of the ingest run")
_SCORE_RUN = _whole(score_run="number of the score run")
_METHOD = _text(method="cosine, dot, bm25 …; of a sum cosine-sum …")
_OVER = _text(over_checkpoints="checkpoints of a sum, as base + epoch-1; else null")
_QUERIES = _text(queries="name of the queries' source")
_QUERY = _QUERIES | _text(query_id="id of the query: a sample of that source")
_QUERY_SIDE = _text(
    query_checkpoint="name of the checkpoint of the queries' gradients",
    query_variant="name of the queries' format variant",
)
_HOW_SCORED = _METHOD | _OVER | _SKETCHER | _QUERY_SIDE | _SCORE_RUN
_RUN = (
    _text(
        device="what it ran on",
        fingerprint="sha256 of sketcher and layout; equal ones can be compared",
        recipe="how it was done, JSON",
        versions="versions of the software, JSON",
    )
    | _whole(lance_version="version of the Lance table that holds its rows")
    | _columns(_TIME, started_at="when it started, UTC", finished_at="when it ended, UTC")
    | _text(error="what ended it, if it failed")
)

VIEWS = {
    "checkpoints": View(
        "A model's weights at one moment of its training",
        _text(
            name="name of the checkpoint",
            model="kind of model",
            path="folder that holds it",
            revision="revision that was named when it was added",
            weights_sha256="sha256 of the weights",
            tokenizer_sha256="sha256 of the tokenizer",
        )
        | _double(epoch="epochs of training so far")
        | _whole(step="optimizer steps so far")
        | _double(learning_rate="learning rate at that moment")
        | _ADDED,
        "SELECT * EXCLUDE (id) FROM _checkpoint",
    ),
    "checkpoint_metrics": View(
        "A figure that was measured at a checkpoint",
        _text(checkpoint="name of the checkpoint", name="name of the figure, such as accuracy")
        | _double(value="its value"),
        "SELECT c.name AS checkpoint, m.name, m.value FROM _metric m JOIN _checkpoint c ON c.id = m.checkpoint_id",
    ),
    "sources": View(
        "A named set of samples",
        _text(
            name="name of the source",
            stage="finetune, pretrain or query",
            domain="what it is about",
            uri="where it was read from",
            licence="its licence",
            columns="which columns became which parts of a sample, JSON",
        )
        | _ADDED,
        "SELECT * EXCLUDE (id) FROM _source",
    ),
    "variants": View(
        "How a sample becomes text, and which tokens are targets",
        _text(
            name="name of the variant",
            template="built-in template or file",
            template_text="the template itself, Jinja",
            targets="response, text, predicted or auto",
        )
        | _whole(max_length="longest text, in tokens")
        | _text(sha256="sha256 of all that it says")
        | _ADDED,
        "SELECT * EXCLUDE (id) FROM _variant",
    ),
    "sketchers": View(
        "What is sketched, and how",
        _text(name="name of the sketcher")
        | _whole(k="bins of a sketch", seed="seed of the map", map_version="version of the map's codes")
        | _text(
            dtype="type of the stored bins: float16 or float32",
            parameters="pattern of the names of what is sketched; null: all",
            exclude="pattern of those that are left out",
            correction="none, tensor, adam, adam2, kfac or ekfac; imported",
            positions="all, or content: the template is masked",
        )
        | _double(damping="added to second moments or curvature, times their mean")
        | _whole(min_ndim="dimensions that a parameter must have; null: any")
        | _double(power="of the inverse curvature: 0.5 or 1")
        | _ADDED
        | _columns("BOOLEAN", is_default="whether it is used where none is named"),
        "SELECT * EXCLUDE (id), name = (SELECT sketcher FROM _meta) AS is_default FROM _sketcher",
    ),
    "corrections": View(
        "The factors that correct gradients at a checkpoint",
        _text(
            checkpoint="name of the checkpoint",
            kind="adam (second moments, of adam and adam2), kfac or ekfac",
            origin="gradients or optimizer",
            sha256="sha256 of their file",
        )
        | _whole(n_bytes="size of their file")
        | _text(sources="names of the sources of the samples")
        | _whole(n_samples="samples that they were fitted to")
        | _text(samples_sha256="sha256 of the samples' ids and contents", recipe="how it was done, JSON")
        | _columns(_TIME, created_at="when they were fitted, UTC"),
        """
        SELECT c.name AS checkpoint, x.kind, x.origin, x.sha256, x.n_bytes, x.sources, x.n_samples, x.samples_sha256,
               x.recipe, x.created_at
        FROM _correction x JOIN _checkpoint c ON c.id = x.checkpoint_id""",
    ),
    "samples": View(
        "A sample; queries are those of sources of stage query",
        _text(source="name of the source")
        | _SAMPLE
        | _text(
            prompt="what is asked, of a prompt and its response",
            response="what is answered",
            text="plain text, of a sample without prompt",
            label="its class",
            meta="other columns that were kept, JSON",
            content_sha256="sha256 of its content",
        ),
        "SELECT * FROM _samples",
    ),
    "ingest_runs": View(
        "The sketching of one source in one variant at one checkpoint",
        _INGEST_RUN
        | _STATUS
        | _SKETCHER
        | _CHECKPOINT
        | _GROUP
        | _whole(
            n_existing="samples that had their sketch before",
            n_sketched="samples that it sketched",
            n_failed="samples that failed; the view failures has the reasons",
        )
        | _double(seconds="time it took, in seconds")
        | _RUN,
        """
        SELECT r.id AS ingest_run, r.status, k.name AS sketcher, c.name AS checkpoint, s.name AS source,
               v.name AS variant, r.n_existing, r.n_sketched, r.n_failed, r.seconds, r.device, r.fingerprint,
               r.recipe, r.versions, r.lance_version, r.started_at, r.finished_at, r.error
        FROM _ingest_run r JOIN _sketcher k ON k.id = r.sketcher_id JOIN _checkpoint c ON c.id = r.checkpoint_id
        JOIN _source s ON s.id = r.source_id JOIN _variant v ON v.id = r.variant_id""",
    ),
    "score_runs": View(
        "The scoring of one source in one variant for some queries",
        _SCORE_RUN
        | _STATUS
        | _METHOD
        | _OVER
        | _SKETCHER
        | _CHECKPOINT
        | _text(query_checkpoint=_QUERY_SIDE["query_checkpoint"].meaning)
        | _QUERIES
        | _text(query_variant=_QUERY_SIDE["query_variant"].meaning)
        | _GROUP
        | _whole(n_queries="queries that were scored", n_samples="samples that they were scored against")
        | _RUN,
        """
        SELECT r.id AS score_run, r.status, r.method, r.over_checkpoints, k.name AS sketcher, c.name AS checkpoint,
               qc.name AS query_checkpoint, q.name AS queries, qv.name AS query_variant, s.name AS source,
               v.name AS variant, r.n_queries, r.n_samples, r.device, r.fingerprint, r.recipe, r.versions,
               r.lance_version, r.started_at, r.finished_at, r.error
        FROM _score_run r JOIN _sketcher k ON k.id = r.sketcher_id JOIN _checkpoint c ON c.id = r.checkpoint_id
        JOIN _checkpoint qc ON qc.id = r.query_checkpoint_id JOIN _source q ON q.id = r.queries_id
        JOIN _variant qv ON qv.id = r.query_variant_id JOIN _source s ON s.id = r.source_id
        JOIN _variant v ON v.id = r.variant_id""",
    ),
    "sketches": View(
        "A sample's sketch at a checkpoint, without its vector",
        _SKETCHER
        | _text(row_key="checkpoint/source/variant/sample_id, a sketcher's key")
        | _CHECKPOINT
        | _GROUP
        | _SAMPLE
        | _INGEST_RUN
        | _columns("INTEGER", n_tokens="tokens of the text", n_loss_tokens="tokens that are targets")
        | _float(
            loss="mean loss, in nats per target token",
            grad_norm="norm of the sketch: an estimate of the gradient's norm",
        ),
        "SELECT r.sketcher, x.* FROM _sketches x JOIN ingest_runs r USING (ingest_run) WHERE r.status = 'done'",
    ),
    "coverage": View(
        "How much of a source was looked at",
        _SKETCHER
        | _CHECKPOINT
        | _GROUP
        | _whole(n_samples="samples that the source has now", n_sketched="samples that have a sketch")
        | _text(chosen="how these were chosen; null: all were to be taken"),
        """
        WITH sizes AS (SELECT source, count(*) AS n_samples FROM _samples GROUP BY ALL),
        taken AS (
            SELECT *, recipe->'candidates' AS of, coalesce(
                'candidates by ' || (of->>'by') || ' for `' || (of->>'queries') || '`',
                'the first ' || (recipe->>'limit')) AS words
            FROM ingest_runs WHERE status = 'done'
        )
        SELECT r.sketcher, r.checkpoint, r.source, r.variant, coalesce(any_value(z.n_samples), 0) AS n_samples,
               sum(r.n_sketched)::BIGINT AS n_sketched,
               CASE WHEN count(*) = count(words) AND sum(r.n_sketched) < coalesce(any_value(z.n_samples), 0)
                    THEN string_agg(DISTINCT words, ' and ' ORDER BY words) END AS chosen
        FROM taken r LEFT JOIN sizes z ON z.source = r.source GROUP BY ALL""",
    ),
    "self_influence": View(
        "A sample's influence on itself at a checkpoint",
        _SKETCHER
        | _CHECKPOINT
        | _GROUP
        | _SAMPLE
        | _double(
            self_influence="grad_norm²: unbiased, the gradient's squared norm",
            learning_rate="learning rate of the checkpoint",
            tracin="learning_rate × self_influence: the checkpoint's TracIn",
        ),
        """
        SELECT x.sketcher, x.checkpoint, x.source, x.variant, x.sample_id,
               x.grad_norm::DOUBLE * x.grad_norm AS self_influence, c.learning_rate,
               c.learning_rate * (x.grad_norm::DOUBLE * x.grad_norm) AS tracin
        FROM sketches x JOIN _checkpoint c ON c.name = x.checkpoint""",
    ),
    "studies": View(
        "An experiment whose tables come from this store",
        _text(
            name="name of the study",
            recipe="its recipe, JSON",
            environment="versions, device and machine, JSON",
            hashes="sha256 of its inputs, checkpoints and tables, JSON",
        )
        | _columns(_TIME, finished_at="when its tables were made, UTC")
        | _ADDED,
        "SELECT name, recipe, environment, hashes, finished_at, created_at FROM _study",
    ),
    "evaluations": View(
        "How true a method's scores were found to be",
        _text(
            evaluation="name of the evaluation",
            kind="lds, facts, causal, tail-patch, format or spearman",
            method="the scores, as they were named",
            measure="what was measured",
            query_id="id of the query; null: of all",
        )
        | _whole(trial="number of the trial; null: there is one")
        | _double(value="the figure")
        | _text(recipe="how it was done, JSON", environment="versions and device, JSON")
        | _columns(_TIME, finished_at="when it was done, UTC"),
        """
        SELECT e.name AS evaluation, e.kind, x.method, x.measure, x.query_id, x.trial, x.value, e.recipe,
               e.environment, e.finished_at
        FROM _evaluation_score x JOIN _evaluation e ON e.id = x.evaluation_id ORDER BY x.id""",
    ),
    "failures": View(
        "A try of a sample that failed: a row for each try",
        _INGEST_RUN | _CHECKPOINT | _GROUP | _SAMPLE | _text(reason="why it failed"),
        "SELECT * FROM _failures",
    ),
    "influence": View(
        "A sample's influence on a query: the best 100 of each group",
        _CHECKPOINT
        | _QUERY
        | _GROUP
        | _columns("INTEGER", rank="place among the group's samples, from 1")
        | _float(score="> 0: training on the sample lowers the query's loss")
        | _SAMPLE
        | _HOW_SCORED,
        """
        SELECT i.checkpoint, r.queries, i.query_id, i.source, i.variant, i.rank, i.score, i.sample_id,
               r.method, r.over_checkpoints, r.sketcher, r.query_checkpoint, r.query_variant, i.score_run
        FROM _influence i JOIN score_runs r USING (score_run) WHERE r.status = 'done'""",
    ),
    "source_influence": View(
        "The influence of a source, in one variant, on a query",
        _CHECKPOINT
        | _QUERY
        | _GROUP
        | _float(max="Φ(D, q): the highest influence of a sample")
        | _text(argmax="id of the sample that has it")
        | _float(mean="mean influence of the samples", std="its standard deviation, the population's")
        | _whole(n="samples of the group")
        | _HOW_SCORED,
        """
        SELECT i.checkpoint, r.queries, i.query_id, i.source, i.variant, i.max, i.argmax, i.mean, i.std, i.n,
               r.method, r.over_checkpoints, r.sketcher, r.query_checkpoint, r.query_variant, i.score_run
        FROM _source_influence i JOIN score_runs r USING (score_run) WHERE r.status = 'done'""",
    ),
}


def overview() -> pl.DataFrame:
    """Return the views and the table functions, with what a row of each is."""
    import polars as pl

    from lark_store.query.sql.functions import FUNCTIONS

    rows = [(name, view.meaning) for name, view in VIEWS.items()]
    rows += [(f"{name}()", function.meaning) for name, function in FUNCTIONS.items()]
    return pl.DataFrame(rows, ["name", "meaning"], orient="row")


def described(name: str) -> pl.DataFrame:
    """Return the columns of a view, or the arguments and columns of a table function, with types and meanings.

    Raises
    ------
    NameUnknownError
    """
    import polars as pl

    from lark_store.errors import NameUnknownError
    from lark_store.query.sql.functions import FUNCTIONS

    found = VIEWS.get(name) or FUNCTIONS.get(name)
    if found is None:
        raise NameUnknownError.of("view", name, [*VIEWS, *FUNCTIONS], "the views are always there")
    given = {} if isinstance(found, View) else found.parameters
    rows = [(f"{name} :=", kind, f"an argument, by default {default}") for name, (kind, default) in given.items()]
    rows += [(column, facts.type, facts.meaning) for column, facts in found.columns.items()]
    return pl.DataFrame(rows, ["column", "type", "meaning"], orient="row")


def schema() -> dict[str, pl.DataFrame]:
    """Return all views and table functions by name, the overview first."""
    from lark_store.query.sql.functions import FUNCTIONS

    return {"views": overview()} | {name: described(name) for name in [*VIEWS, *FUNCTIONS]}
