"""The cost of sketching a mixture of experts: batched, one sample at a time, and plain forward and backward.

    python benchmarks/experts.py
    python benchmarks/experts.py --models OLMoE --lengths 32 --rounds 5

Random models of four layers; texts are random tokens. Times are CPU seconds of one thread, so other work on the machine
weighs less. Rows are measured in turn, round by round; figures are medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf
from ingest import in_turn, path_for, table, tokens
from rivals import batch_loss, pack

from lark_store.gradients.paths.batched import BatchPath, make_path
from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.modeling.tokens import Tokens

BASE = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
MODELS = {
    "Mixtral": hf.MixtralConfig(**GROUPED, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2),
    "OLMoE": hf.OlmoeConfig(**GROUPED, intermediate_size=256, num_experts=16, num_experts_per_tok=4),
    "Qwen3-MoE": hf.Qwen3MoeConfig(
        **GROUPED, head_dim=64, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4
    ),
    "DeepSeek-V3": hf.DeepseekV3Config(
        **BASE, num_key_value_heads=4, intermediate_size=512, moe_intermediate_size=256, n_routed_experts=16,
        n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=64,
        kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """Return a random model whose routers tell tokens apart."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MODELS[name]).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("gate.weight"):
                parameter.normal_(0, 0.5)
    return model


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Time one call in CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def sketched(model: Any, batches: Sequence[Sequence[Tokens]], kind: str) -> float:
    """Return CPU seconds of sketching these batches, after a warm-up on one sample."""
    path = path_for(model, kind)
    path.sketch(batches[0][:1])
    spent = cpu_seconds(lambda: [path.sketch(batch) for batch in batches])
    path.close()
    return spent


def plain(model: Any, batches: Sequence[Sequence[Tokens]]) -> float:
    """Return CPU seconds of a forward and backward pass, one gradient for each batch."""
    model.requires_grad_(True)

    def work() -> None:
        for batch in batches:
            batch_loss(model, batch, torch.device("cpu")).backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)

    spent = cpu_seconds(work)
    model.requires_grad_(False)
    return spent


def check(model: Any) -> None:
    """Fail unless an ingest would batch the model: its sketches then agree with autograd's gradients."""
    parameters = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in parameters], 4096)
    path, reason = make_path(model, parameters, GradientSketcher(Oporp(4096, 0), placements, torch.device("cpu")))
    path.close()
    if not isinstance(path, BatchPath):
        raise SystemExit(f"the model is not batched: {reason}")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 128])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        model = build(name)
        check(model)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        for length in options.lengths:
            samples = tokens(options.samples, length, 4096)
            batches = pack(samples, options.batch_tokens)
            ways: dict[str, Callable[[], float]] = {
                "plain": lambda m=model, b=batches: plain(m, b),
                "batched": lambda m=model, b=batches: sketched(m, b, "batched"),
                "alone": lambda m=model, s=samples: sketched(m, [[sample] for sample in s], "hooks"),
            }
            times = in_turn(ways, options.rounds)
            middle = {way: statistics.median(spent) / options.samples for way, spent in times.items()}
            ratios = [middle["alone"] / middle["batched"], middle["batched"] / middle["plain"]]
            rows.append([name, f"{millions:.1f}", length, *middle.values(), *ratios])
    header = ["model", "M parameters", "tokens", "plain, batched", "**batched**", "one at a time"]
    table("CPU seconds per sample", [*header, "one at a time ÷ batched", "batched ÷ plain"], rows)


if __name__ == "__main__":
    main()
