"""The recipe of the bundled sample: whole Wikigold documents until there are about 300 sentences.

    python -m nermill.model_build.demo.cut_sample wikigold.conll.txt --out model_build/demo/sample

Writes ``wikigold.conll`` (words and gold tags as they were) and ``wikigold.jsonl`` (the same documents as
running text). The corpus is CC BY 4.0: see the sample's README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SENTENCES = 300
DOCUMENT_MARK = "-DOCSTART- O"
_CLOSING = frozenset([",", ".", ";", ":", "!", "?", ")", "]", "%", "...", ".."])
_OPENING = frozenset(["(", "[", "/"])
_CLITICS = ("'s", "'re", "'d", "'ll", "'ve", "'m", "n't", "/")

Sentence = list[str]  # lines of "word tag"


def read_documents(path: Path) -> list[list[Sentence]]:
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


def main() -> None:
    """Cuts the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sample: list[list[Sentence]] = []
    for document in read_documents(arguments.corpus):
        if sum(map(len, sample)) >= SENTENCES:
            break
        sample.append(document)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "wikigold.conll").open("w", encoding="utf-8") as conll:
        for document in sample:
            conll.write(f"{DOCUMENT_MARK}\n\n")
            conll.writelines("\n".join(sentence) + "\n\n" for sentence in document)
    with (arguments.out / "wikigold.jsonl").open("w", encoding="utf-8") as jsonl:
        for number, document in enumerate(sample):
            text = " ".join(detokenize([line.split()[0] for line in sentence]) for sentence in document)
            jsonl.write(json.dumps({"id": f"wikigold-{number:03d}", "text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
