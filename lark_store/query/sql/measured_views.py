"""The SQL views of probed facts and measured influence."""

from __future__ import annotations

from lark_store.query.sql.columns import columns, double, text
from lark_store.query.sql.view_columns import DEVICE, ENDING, GROUP, QUERIES, QUERY, SAMPLE, STATUS, View, whole

_AT = text(checkpoint="name of the checkpoint")
_PROBE_RUN = whole(probe_run="number of the probe run")
_EIF_RUN = whole(eif_run="number of the EIF run")
_HOW_MEASURED = (
    text(mode="finetune (a step on the sample) or context", optimizer="its optimizer; null in context")
    | double(learning_rate="its learning rate; null in context")
    | whole(draw="number of the domain's draw; null: none")
)

MEASURED_VIEWS = {
    "probe_runs": View(
        "The probing of one source's facts at one checkpoint",
        _PROBE_RUN
        | STATUS
        | _AT
        | GROUP
        | text(decoding="greedy, or sampled: answers were sampled too")
        | double(temperature="temperature of the samples")
        | whole(
            n_samples="answers sampled per fact",
            seed="seed of the samples",
            n_probed="facts probed",
            n_failed="failed facts; see the view probes for reasons",
        )
        | DEVICE
        | ENDING,
        """
        SELECT r.id AS probe_run, r.status, c.name AS checkpoint, s.name AS source, v.name AS variant, r.decoding,
               r.temperature, r.n_samples, r.seed, r.n_probed, r.n_failed, r.device, r.recipe, r.versions,
               r.lance_version, r.started_at, r.finished_at, r.error
        FROM _probe_run r JOIN _checkpoint c ON c.id = r.checkpoint_id JOIN _source s ON s.id = r.source_id
        JOIN _variant v ON v.id = r.variant_id""",
    ),
    "probes": View(
        "A fact at a checkpoint: does the model know its answer?",
        _PROBE_RUN
        | _AT
        | GROUP
        | SAMPLE
        | columns("BOOLEAN", is_correct="whether greedy decoding gives the answer")
        | columns("INTEGER", n_correct="sampled answers that match; null: none sampled", n_samples="sampled answers")
        | double(
            answer_logprob="log-probability of the answer and its end, in nats",
            p_any="1 − (1 − p)^n: chance that n samples hold the answer",
        )
        | columns("BOOLEAN", is_latent="greedy is wrong, but a sample is correct")
        | columns("INTEGER", n_tokens="tokens of the answer and its end")
        | text(output="greedy answer, where it differs", reason="why the fact could not be probed; else null"),
        """
        SELECT x.probe_run, x.checkpoint, x.source, x.variant, x.sample_id, x.is_correct,
               CASE WHEN x.n_samples > 0 THEN x.n_correct END AS n_correct, x.n_samples, x.answer_logprob,
               CASE WHEN x.n_samples > 0 THEN  -- 1 − p rounds to 1 where p is small
                   CASE WHEN p < 1e-8 THEN x.n_samples * p ELSE 1 - pow(1 - p, x.n_samples) END END AS p_any,
               CASE WHEN x.n_samples > 0 THEN NOT x.is_correct AND x.n_correct > 0 END AS is_latent,
               x.n_tokens, x.output, x.reason
        FROM (FROM _probes SELECT *, least(exp(answer_logprob), 1) AS p) x JOIN _probe_run r ON r.id = x.probe_run
        WHERE r.status = 'done'""",
    ),
    "eif_runs": View(
        "A matrix of measured influence at a checkpoint",
        _EIF_RUN
        | STATUS
        | _AT
        | GROUP
        | QUERIES
        | text(query_variant="name of the queries' format variant")
        | _HOW_MEASURED
        | whole(n_samples="number of samples", n_queries="number of queries")
        | DEVICE
        | ENDING,
        """
        SELECT r.id AS eif_run, r.status, c.name AS checkpoint, s.name AS source, v.name AS variant, q.name AS queries,
               qv.name AS query_variant, r.mode, r.optimizer, r.learning_rate, r.draw, r.n_samples, r.n_queries,
               r.device, r.recipe, r.versions, r.lance_version, r.started_at, r.finished_at, r.error
        FROM _eif_run r JOIN _checkpoint c ON c.id = r.checkpoint_id JOIN _source s ON s.id = r.source_id
        JOIN _variant v ON v.id = r.variant_id JOIN _source q ON q.id = r.queries_id
        JOIN _variant qv ON qv.id = r.query_variant_id""",
    ),
    "eif": View(
        "A sample's measured influence on a query",
        _EIF_RUN
        | _AT
        | GROUP
        | SAMPLE
        | QUERY
        | text(query_variant="name of the queries' format variant")
        | _HOW_MEASURED
        | double(
            loss_before="the query's loss before, in nats per target token",
            loss_after="its loss after training on the sample, likewise",
            value="loss_before − loss_after; > 0: the sample helps",
        ),
        """
        SELECT x.eif_run, r.checkpoint, r.source, r.variant, x.sample_id, r.queries, x.query_id, r.query_variant,
               r.mode, r.optimizer, r.learning_rate, r.draw, x.loss_before, x.loss_after, x.value
        FROM _eif x JOIN eif_runs r USING (eif_run) WHERE r.status = 'done'""",
    ),
    "eif_pairs": View(
        "Two samples' measured influence on each other",
        _EIF_RUN
        | _AT
        | text(source="name of the source", a="id of one sample", b="id of the other, which sorts after it")
        | _HOW_MEASURED
        | double(a_on_b="measured influence of a on b", b_on_a="measured influence of b on a"),
        """
        SELECT x.eif_run, x.checkpoint, x.source, x.sample_id AS a, x.query_id AS b, x.mode, x.optimizer,
               x.learning_rate, x.draw, x.value AS a_on_b, y.value AS b_on_a
        FROM eif x JOIN eif y ON y.eif_run = x.eif_run AND y.sample_id = x.query_id AND y.query_id = x.sample_id
        WHERE x.source = x.queries AND x.sample_id < x.query_id""",
    ),
}
