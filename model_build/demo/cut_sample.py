"""The recipe of the bundled sample: documents that the demo model was not trained on, from three sources.

    python -m nermill.model_build.demo.cut_sample --data DATA --out model_build/demo/sample

Writes ``wikigold.conll`` (whole Wikigold documents, about 300 sentences, words and gold tags as they were),
``wikigold.jsonl`` (the same documents as running text), and, from the held-out parts of two training corpora,
``tweets.conll`` (WNUT17) and ``crossner.conll``, their types mapped to PER, ORG, LOC and MISC. See the sample's
README.md for the licences.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nermill.model_build.demo.corpora import OPEN, OUTSIDE, Corpus, Sentence, read_all

SENTENCES = 300
HELD_OUT_SENTENCES = 40
DOCUMENT_MARK = "-DOCSTART- O"
_CLOSING = frozenset([",", ".", ";", ":", "!", "?", ")", "]", "%", "...", ".."])
_OPENING = frozenset(["(", "[", "/"])
_CLITICS = ("'s", "'re", "'d", "'ll", "'ve", "'m", "n't", "/")

Lines = list[str]  # "word tag", one sentence


def read_documents(path: Path) -> list[list[Lines]]:
    """Reads two-column CoNLL with document marks."""
    documents = []
    for block in path.read_text("utf-8").split(DOCUMENT_MARK):
        sentences = [part.splitlines() for part in block.strip().split("\n\n") if part.strip()]
        if sentences:
            documents.append([[line.strip() for line in lines if line.strip()] for lines in sentences])
    return documents


def detokenize(words: list[str]) -> str:
    """Joins words into running text: punctuation closes up, quotation marks pair within the sentence."""
    text = ""
    glue = True  # nothing between this word and what stands before it
    quoted = False
    for word in words:
        closes_up = word in _CLOSING or word in _CLITICS or (word == "'" and text.endswith("s"))
        if word == '"':
            closes_up, quoted = quoted, not quoted
        text += word if glue or closes_up else f" {word}"
        glue = word in _OPENING or (word == '"' and quoted)
    return text


def decided(corpus: Corpus) -> list[Lines]:
    """Held-out sentences whose tags are all decided: no entity and no word with several allowed labels."""
    return [
        lines(sentence)
        for document in corpus.held
        for sentence in document
        if all(len(span.labels) == 1 for span in sentence.spans) and OPEN not in sentence.allowed
    ]


def lines(sentence: Sentence) -> Lines:
    """Words with their IOB2 tags."""
    tags = [OUTSIDE] * len(sentence.words)
    for span in sentence.spans:
        tags[span.start : span.end] = [f"I-{span.labels[0]}"] * (span.end - span.start)
        tags[span.start] = f"B-{span.labels[0]}"
    return [f"{word} {tag}" for word, tag in zip(sentence.words, tags, strict=True)]


def write_conll(path: Path, documents: list[list[Lines]]) -> None:
    """Writes two-column CoNLL with document marks."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(f"{DOCUMENT_MARK}\n\n")
            file.writelines("\n".join(sentence) + "\n\n" for sentence in document)


def main() -> None:
    """Cuts the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sample: list[list[Lines]] = []
    for document in read_documents(arguments.data / "wikigold" / "wikigold.conll.txt"):
        if sum(map(len, sample)) >= SENTENCES:
            break
        sample.append(document)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_conll(arguments.out / "wikigold.conll", sample)
    with (arguments.out / "wikigold.jsonl").open("w", encoding="utf-8") as jsonl:
        for number, document in enumerate(sample):
            text = " ".join(detokenize([line.split()[0] for line in sentence]) for sentence in document)
            jsonl.write(json.dumps({"id": f"wikigold-{number:03d}", "text": text}, ensure_ascii=False) + "\n")
    held_out = {corpus.name: decided(corpus) for corpus in read_all(arguments.data)[0]}
    for source, name in (("wnut17", "tweets"), ("crossner", "crossner")):
        chosen = held_out[source][:HELD_OUT_SENTENCES]
        write_conll(arguments.out / f"{name}.conll", [[sentence] for sentence in chosen])


if __name__ == "__main__":
    main()
