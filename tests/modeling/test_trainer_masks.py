"""Target tokens and losses against those of TRL's SFTTrainer, for each form of rows that it trains on."""

import pytest
import torch
import trl
from datasets import Dataset
from helpers.checkpoints import save_checkpoint
from transformers import AutoTokenizer

from lark_store.modeling.forms.rows import make_samples
from lark_store.modeling.losses import Batch, sample_losses
from lark_store.modeling.rendering import Renderer, make_variant

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TURNS = [user("Is aspirin safe?"), assistant("Mostly."), user("For children?"), assistant("No.")]
ROWS = {
    "messages": (
        "chatml",
        [{"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}, {"messages": TURNS[:2]}],
    ),
    "completion": ("raw", [{"prompt": "2 + 2 = ", "completion": "4"}, {"prompt": "A", "completion": " cat\n sat"}]),
}
TRAINED = {"messages": {"assistant_only_loss": True}, "completion": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny", seed=3, chat_template=MARKED)


@pytest.mark.parametrize("form", ROWS)
def test_targets_and_losses_equal_the_trainers(folder, tmp_path, form):
    template, rows = ROWS[form]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **TRAINED[form])
    trainer = trl.SFTTrainer(
        str(folder), args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    model = trainer.model.float().eval()
    renderer = Renderer(make_variant("v", template, "assistant+end", 1024), tokenizer)
    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        (sample,) = make_samples(row, {})[1]
        tokens = renderer.render(sample)
        labels = [token if target else -100 for token, target in zip(tokens.input_ids, tokens.is_target, strict=True)]
        batch = trainer.data_collator([trained])
        assert tokens.input_ids == batch["input_ids"][0].tolist()
        assert labels == batch["labels"][0].tolist()
        with torch.no_grad():
            expected = float(trainer.compute_loss(model, batch))
            assert float(sample_losses(model, Batch([tokens], torch.device("cpu")))) == pytest.approx(
                expected, abs=1e-5
            )


ASPIRIN, ALPACA = "Is aspirin safe?", {"instruction": "Translate.", "input": "chat", "output": "cat"}
SIDES = {"prompt": ASPIRIN, "chosen": "Mostly.", "rejected": "Never."}
FORMS = [  # a row, and the targets of its samples, raw and as ChatML
    ({"messages": TURNS}, [["Mostly.", "No."]]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [["b"]]),
    ({"prompt": ASPIRIN, "completion": "Mostly."}, [["Mostly."]]),
    ({"prompt": TURNS[:3], "completion": TURNS[3:]}, [["No."]]),
    (ALPACA, [["cat"]]),
    (ALPACA | {"input": ""}, [["cat"]]),
    (SIDES, [["Mostly."], ["Never."]]),
    ({"prompt": [user(ASPIRIN)], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}, [["Yes."], ["No."]]),
    ({"prompt": ASPIRIN, "response": "Mostly."}, [["Mostly."]]),
    ({"question": "Safe?", "context": "It is.", "answer": "yes"}, [["yes"]]),
]


@pytest.mark.parametrize("template", ["raw", "chatml"])
@pytest.mark.parametrize(("row", "expected"), FORMS, ids=[" ".join(row) for row, _ in FORMS])
def test_targets_of_every_form(folder, template, row, expected):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(make_variant("v", template, "auto", 1024), tokenizer)
    _, samples = make_samples(row, {})
    found = []
    for sample in samples:
        tokens = renderer.render(sample)
        runs = [""]
        for token, is_target in zip(tokens.input_ids, tokens.is_target, strict=True):
            runs = [*runs[:-1], runs[-1] + tokenizer.decode([token])] if is_target else [*runs, ""]
        found.append([run for run in runs if run])
    assert found == expected
