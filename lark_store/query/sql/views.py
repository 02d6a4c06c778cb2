"""The SQL views, with the meaning of their columns: the source of help, shell and docs."""

from __future__ import annotations

from lark_store.core.names import IMPORTED
from lark_store.core.text import joined
from lark_store.gradients.corrections import CORRECTIONS, users_by_kind
from lark_store.query.sql.columns import columns, double, text
from lark_store.query.sql.measured_views import MEASURED_VIEWS
from lark_store.query.sql.view_columns import (
    ADDED,
    CHECKPOINT,
    GROUP,
    HOW_SCORED,
    INGEST_RUN,
    METHOD,
    OVER,
    QUERIES,
    QUERY,
    QUERY_SIDE,
    RUN,
    SAMPLE,
    SCORE_RUN,
    SKETCHER,
    STATUS,
    TIME,
    View,
    single,
    whole,
)

VIEWS = {
    "checkpoints": View(
        "A model's weights at one point of its training",
        text(
            name="name of the checkpoint",
            model="model type",
            path="folder of its files",
            revision="revision given when it was added",
            weights_sha256="sha256 of the weights",
            tokenizer_sha256="sha256 of the tokenizer",
        )
        | double(epoch="epochs of training so far")
        | whole(step="optimizer steps so far")
        | double(learning_rate="learning rate at that point")
        | text(parts="where its config and tokenizer are, if not in path, JSON")
        | ADDED,
        "SELECT * EXCLUDE (id) FROM _checkpoint",
    ),
    "checkpoint_metrics": View(
        "A metric of a checkpoint",
        text(checkpoint="name of the checkpoint", name="name of the metric, such as accuracy")
        | double(value="its value"),
        "SELECT c.name AS checkpoint, m.name, m.value FROM _metric m JOIN _checkpoint c ON c.id = m.checkpoint_id",
    ),
    "sources": View(
        "A named set of samples",
        text(
            name="name of the source",
            stage="finetune, pretrain or query",
            domain="subject area",
            uri="file or dataset it was read from",
            licence="its licence",
            columns="mapping of columns to parts of a sample, JSON",
        )
        | ADDED,
        "SELECT * EXCLUDE (id, is_stripped) FROM _source",
    ),
    "variants": View(
        "How a sample becomes text, and which tokens are targets",
        text(
            name="name of the variant",
            template="built-in template or file",
            template_text="the template itself, Jinja",
            targets="target rule: response, assistant+end, text, auto, …",
        )
        | whole(max_length="maximum length of a text, in tokens")
        | text(sha256="sha256 of its settings")
        | ADDED
        | text(loss="mean or sum over the targets", answers="settings of predicted-answer, JSON; else null"),
        "SELECT * EXCLUDE (id, loss, answers), coalesce(loss, 'mean') AS loss, answers FROM _variant",
    ),
    "sketchers": View(
        "A way of sketching gradients",
        text(name="name of the sketcher")
        | whole(k="bins of a sketch", seed="seed of the map", map_version="version of the map's codes")
        | text(
            dtype="type of the stored bins: float16 or float32",
            parameters="pattern of the sketched parameters' names; null: all",
            exclude="pattern of the excluded parameters' names",
            correction=joined([*CORRECTIONS, IMPORTED], "or"),
            positions="all, or content: the template is masked",
        )
        | double(damping="added to second moments or curvature, times their mean")
        | whole(min_ndim="minimum dimensions of a parameter; null: any")
        | double(power="exponent of the inverse curvature: 0.5 or 1")
        | ADDED
        | columns("BOOLEAN", is_default="whether it is the default sketcher"),
        "SELECT * EXCLUDE (id), name = (SELECT sketcher FROM _meta) AS is_default FROM _sketcher",
    ),
    "corrections": View(
        "The factors that correct gradients at a checkpoint",
        text(
            checkpoint="name of the checkpoint",
            kind=f"kind of factors: {joined(users_by_kind(), 'or')}",
            origin="gradients or optimizer",
            sha256="sha256 of their file",
        )
        | whole(n_bytes="size of their file")
        | text(sources="names of the samples' sources")
        | whole(n_samples="number of samples they were fitted to")
        | text(samples_sha256="sha256 of the samples' ids and contents", recipe="settings, JSON")
        | columns(TIME, created_at="when they were fitted, UTC"),
        """
        SELECT c.name AS checkpoint, x.kind, x.origin, x.sha256, x.n_bytes, x.sources, x.n_samples, x.samples_sha256,
               x.recipe, x.created_at
        FROM _correction x JOIN _checkpoint c ON c.id = x.checkpoint_id""",
    ),
    "samples": View(
        "A sample; samples of stage-query sources are queries",
        text(source="name of the source")
        | SAMPLE
        | text(
            prompt="prompt, if the sample has one",
            response="response to the prompt",
            completion="continuation of the prompt, with nothing between them",
            text="plain text, if the sample has no prompt",
            messages="messages of a chat, JSON as given",
            tools="tools of a chat, JSON as given",
            label="its class",
            meta="other columns of the source, JSON",
            content_sha256="sha256 of its content",
        ),
        """
        SELECT source, sample_id, prompt, response, completion, text, messages, tools, label, meta, content_sha256
        FROM _samples""",
    ),
    "ingest_runs": View(
        "The sketching of one source in one variant at one checkpoint",
        INGEST_RUN
        | STATUS
        | SKETCHER
        | CHECKPOINT
        | GROUP
        | whole(
            n_existing="samples already sketched before",
            n_sketched="samples sketched by this run",
            n_failed="failed samples; see the view failures for reasons",
        )
        | double(seconds="duration, in seconds")
        | RUN,
        """
        SELECT r.id AS ingest_run, r.status, k.name AS sketcher, c.name AS checkpoint, s.name AS source,
               v.name AS variant, r.n_existing, r.n_sketched, r.n_failed, r.seconds, r.device, r.fingerprint,
               r.recipe, r.versions, r.lance_version, r.started_at, r.finished_at, r.error
        FROM _ingest_run r JOIN _sketcher k ON k.id = r.sketcher_id JOIN _checkpoint c ON c.id = r.checkpoint_id
        JOIN _source s ON s.id = r.source_id JOIN _variant v ON v.id = r.variant_id""",
    ),
    "score_runs": View(
        "The scoring of one source in one variant for some queries",
        SCORE_RUN
        | STATUS
        | METHOD
        | OVER
        | SKETCHER
        | CHECKPOINT
        | text(query_checkpoint=QUERY_SIDE["query_checkpoint"].meaning)
        | QUERIES
        | text(query_variant=QUERY_SIDE["query_variant"].meaning)
        | GROUP
        | whole(n_queries="number of queries", n_samples="number of samples scored")
        | RUN,
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
        SKETCHER
        | text(row_key="checkpoint/source/variant/sample_id, a sketcher's key")
        | CHECKPOINT
        | GROUP
        | SAMPLE
        | INGEST_RUN
        | columns("INTEGER", n_tokens="number of tokens in the text", n_loss_tokens="number of target tokens")
        | single(
            loss="mean loss, in nats per target token",
            grad_norm="norm of the sketch, an estimate of the gradient's norm",
        )
        | columns("INTEGER", n_cut="tokens cut off; null: not counted (older rows, imports)"),
        """
        SELECT r.sketcher, x.* EXCLUDE (answer, answer_tokens)
        FROM _sketches x JOIN ingest_runs r USING (ingest_run) WHERE r.status = 'done'""",
    ),
    "predictions": View(
        "An answer that a checkpoint predicted for a sample",
        SKETCHER
        | CHECKPOINT
        | GROUP
        | SAMPLE
        | text(answer="the answer")
        | double(log_probability="log-probability, summed over its tokens, in nats")
        | columns("INTEGER", n_tokens="number of its tokens"),
        """
        SELECT r.sketcher, x.checkpoint, x.source, x.variant, x.sample_id, x.answer,
               -x.loss::DOUBLE * CASE WHEN v.loss = 'sum' THEN 1 ELSE x.n_loss_tokens END AS log_probability,
               x.n_loss_tokens AS n_tokens
        FROM _sketches x JOIN ingest_runs r USING (ingest_run) JOIN _variant v ON v.name = x.variant
        WHERE r.status = 'done' AND x.answer IS NOT NULL""",
    ),
    "coverage": View(
        "How much of a source is sketched",
        SKETCHER
        | CHECKPOINT
        | GROUP
        | whole(
            n_samples="samples in the source now",
            n_sketched="samples with a sketch",
            n_truncated="truncated samples among these; null: not all counted",
            n_cut="tokens cut off these; null: not all counted",
        )
        | text(chosen="how these were chosen; null: no selection"),
        """
        WITH sizes AS (SELECT source, count(*) AS n_samples FROM _samples GROUP BY ALL),
        taken AS (
            SELECT *, recipe->'candidates' AS of, coalesce(
                'candidates by ' || (of->>'by') || ' for `' || (of->>'queries') || '`',
                'the first ' || (recipe->>'limit')) AS words
            FROM ingest_runs WHERE status = 'done'
        ),
        cuts AS (
            SELECT ingest_run, count(*) - count(n_cut) AS n_unknown, count(*) FILTER (n_cut > 0) AS n_truncated,
                   sum(n_cut) AS n_cut
            FROM _sketches GROUP BY ALL
        )
        SELECT r.sketcher, r.checkpoint, r.source, r.variant, coalesce(any_value(z.n_samples), 0) AS n_samples,
               sum(r.n_sketched)::BIGINT AS n_sketched,
               CASE WHEN coalesce(sum(u.n_unknown), 0) = 0 THEN coalesce(sum(u.n_truncated), 0)::BIGINT END
                   AS n_truncated,
               CASE WHEN coalesce(sum(u.n_unknown), 0) = 0 THEN coalesce(sum(u.n_cut), 0)::BIGINT END AS n_cut,
               CASE WHEN count(*) = count(words) AND sum(r.n_sketched) < coalesce(any_value(z.n_samples), 0)
                    THEN string_agg(DISTINCT words, ' and ' ORDER BY words) END AS chosen
        FROM taken r LEFT JOIN sizes z ON z.source = r.source LEFT JOIN cuts u ON u.ingest_run = r.ingest_run
        GROUP BY ALL""",
    ),
    "self_influence": View(
        "A sample's influence on itself at a checkpoint",
        SKETCHER
        | CHECKPOINT
        | GROUP
        | SAMPLE
        | double(
            self_influence="grad_norm², an unbiased estimate of the squared norm",
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
        "An experiment with tables from this store",
        text(
            name="name of the study",
            recipe="its recipe, JSON",
            environment="versions, device and machine, JSON",
            hashes="sha256 of its inputs, checkpoints and tables, JSON",
        )
        | columns(TIME, finished_at="when its tables were created, UTC")
        | ADDED,
        "SELECT name, recipe, environment, hashes, finished_at, created_at FROM _study",
    ),
    "evaluations": View(
        "A measurement of the quality of a method's scores",
        text(
            evaluation="name of the evaluation",
            kind="command of `lark-store evaluate`, such as lds",
            method="name of the scores",
            measure="measured quantity",
            query_id="id of the query; null: over all",
        )
        | whole(trial="number of the trial; null: there is one")
        | double(value="measured value")
        | text(recipe="settings, JSON", environment="versions and device, JSON")
        | columns(TIME, finished_at="when it was done, UTC"),
        """
        SELECT e.name AS evaluation, e.kind, x.method, x.measure, x.query_id, x.trial, x.value, e.recipe,
               e.environment, e.finished_at
        FROM _evaluation_score x JOIN _evaluation e ON e.id = x.evaluation_id ORDER BY x.id""",
    ),
    "failures": View(
        "A failed attempt to sketch a sample",
        INGEST_RUN | CHECKPOINT | GROUP | SAMPLE | text(reason="reason of the failure"),
        "SELECT ingest_run, checkpoint, source, variant, sample_id, reason FROM _failures",
    ),
    "influence": View(
        "A sample's influence on a query: the top 100 of each group",
        CHECKPOINT
        | QUERY
        | GROUP
        | columns("INTEGER", rank="rank among the group's samples, from 1")
        | single(score="> 0: training on the sample lowers the query's loss")
        | SAMPLE
        | HOW_SCORED,
        """
        SELECT i.checkpoint, r.queries, i.query_id, i.source, i.variant, i.rank, i.score, i.sample_id,
               r.method, r.over_checkpoints, r.sketcher, r.query_checkpoint, r.query_variant, i.score_run
        FROM _influence i JOIN score_runs r USING (score_run) WHERE r.status = 'done'""",
    ),
    "source_influence": View(
        "The influence of a source, in one variant, on a query",
        CHECKPOINT
        | QUERY
        | GROUP
        | single(max="Φ(D, q), the highest influence of a sample")
        | text(argmax="id of the sample with the highest influence")
        | single(mean="mean influence of the samples", std="population standard deviation")
        | whole(n="number of samples in the group")
        | HOW_SCORED,
        """
        SELECT i.checkpoint, r.queries, i.query_id, i.source, i.variant, i.max, i.argmax, i.mean, i.std, i.n,
               r.method, r.over_checkpoints, r.sketcher, r.query_checkpoint, r.query_variant, i.score_run
        FROM _source_influence i JOIN score_runs r USING (score_run) WHERE r.status = 'done'""",
    ),
    **MEASURED_VIEWS,
}
