"""Converts a record of any format to a document: a text, or words with or without tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nermill.producer.sources.options import (
    ReadOptions,
    is_unicode,
    no_id_field,
    no_text_field,
    reject,
    text_document,
)
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.tags import is_tag, to_iob2

WORDS_FIELDS = ("tokens", "words")  # used where no field has the default name of the text
TAGS_FIELDS = ("ner_tags", "tags")

_TYPES = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}


class Records:
    """Converts the records of one file, and refuses a file in which no record has the fields of the options.

    Args:
        options: Names of the fields.
        tag_names: Names of tags that are numbers; ``options.tag_names`` takes precedence.
    """

    def __init__(self, options: ReadOptions, tag_names: Sequence[str] = ()) -> None:
        self._options, self._names = options, options.tag_names or tag_names
        self._has_text = self._has_id = False
        self._without: tuple[str, list[str]] | None = None

    def document(self, record: Any, where: str) -> Document:
        """The document of a record; a reject where the record is no object.

        Args:
            record: The record.
            where: ``path:line``, for messages and for a record without an id.
        """
        if not isinstance(record, dict):
            self._without = self._without or (where, [])
            return reject(where, where, "wrong_type", f"a {_type_name(record)} where an object should be")
        if not (self._has_text and self._has_id):
            self._has_id |= self._options.id_column in record
            self._has_text |= content_field(record, self._options) is not None
            if self._without is None or not self._without[1]:
                self._without = (where, list(record))
        return record_document(record, where, self._options, self._names)

    def check(self) -> None:
        """Checks, after the last record, that any record had the fields.

        Raises:
            UsageError: no record had. A file without readable records is not refused here.
        """
        if self._without is None:
            return
        if not self._has_text:
            raise no_text_field(*self._without, self._options)
        if not self._has_id and self._options.id_column != ReadOptions.id_column:
            raise no_id_field(*self._without, self._options)


def content_field(names: Any, options: ReadOptions) -> str | None:
    """The name of the field that has a record's text or words; None where there is none.

    Args:
        names: The record, or the names of its fields.
        options: For ``text_column``.
    """
    if options.text_column in names:
        return options.text_column
    others = WORDS_FIELDS if options.text_column == ReadOptions.text_column else ()
    return next((name for name in others if name in names), None)


def tags_field(names: Any) -> str | None:
    """The name of the field that has the tags of a record's words; None where there is none."""
    return next((name for name in TAGS_FIELDS if name in names), None)


def record_document(
    record: dict[str, Any], where: str, options: ReadOptions, tag_names: Sequence[str] = ()
) -> Document:
    """The document of a record; a reject where the record cannot be tagged.

    Args:
        record: Values by field; a value that could not be read is an exception.
        where: ``path:line``, for messages and for a record without an id.
        options: Names of the fields.
        tag_names: Names of tags that are numbers.
    """
    try:
        identity = record_id(record.get(options.id_column), where)
    except TypeError as error:
        return reject(where, where, "wrong_type", str(error))
    if not is_unicode(identity):
        return reject(identity, where, "not_utf8", "the id has lone surrogates")
    name = content_field(record, options)
    content = None if name is None else record[name]
    if name is None or content is None:
        return reject(identity, where, "missing_field", f"no field {options.text_column!r}")
    if isinstance(content, UnicodeDecodeError):
        return reject(identity, where, "not_utf8", "the text is not UTF-8")
    tags_name = tags_field(record) if isinstance(content, list) else None
    fields = None
    if options.keep_fields:
        fields = {k: v for k, v in record.items() if k not in (options.id_column, name, tags_name)}
    if isinstance(content, str) and name == options.text_column:
        return text_document(identity, content, fields, where)
    if not isinstance(content, list):
        wanted = "a string" if name == options.text_column else "a list of words"
        return reject(identity, where, "wrong_type", f"{name!r} is a {_type_name(content)}, not {wanted}")
    tags = None if tags_name is None else record[tags_name]
    try:
        words = _words(content, name)
        return Document(identity, words=words, gold_tags=_gold(tags, len(words), tag_names), fields=fields)
    except TypeError as error:
        return reject(identity, where, "wrong_type", str(error))
    except LookupError as error:
        return reject(identity, where, "empty", str(error.args[0]))
    except ValueError as error:
        return reject(identity, where, "malformed", str(error))


def record_id(value: Any, fallback: str) -> str:
    """The id of a record as a string; ``fallback`` where it has none.

    Raises:
        TypeError: the id is a list, an object or bytes.
    """
    if value is None or value == "":
        return fallback
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict, bytes, Exception)):
        raise TypeError(f"the id is a {type(value).__name__}, not a string or number")
    return str(value)


def _words(content: list[Any], name: str) -> tuple[str, ...]:
    """The words of a list.

    Raises:
        TypeError: a word is no string.
        LookupError: there is no word, or one is empty.
        ValueError: a word has lone surrogates.
    """
    if not content:
        raise LookupError(f"{name!r} has no words")
    for at, word in enumerate(content, 1):
        if not isinstance(word, str):
            raise TypeError(f"word {at} of {name!r} is a {_type_name(word)}, not a string")
        if not word:
            raise LookupError(f"word {at} of {name!r} is empty")
    if not is_unicode("".join(content)):
        raise ValueError(f"{name!r} has lone surrogates")
    return tuple(content)


def _gold(tags: Any, words: int, names: Sequence[str]) -> tuple[str, ...] | None:
    """Tags as IOB2; None where there are none.

    Raises:
        TypeError: the tags are no list of strings or numbers.
        ValueError: a number has no name, a tag belongs to no scheme, or there is not one tag for each word.
    """
    if tags is None:
        return None
    if not isinstance(tags, list):
        raise TypeError(f"the tags are a {_type_name(tags)}, not a list")
    if len(tags) != words:
        raise ValueError(f"{len(tags)} tags for {words} words")
    return to_iob2([_tag(tag, names) for tag in tags], "BIOES")  # its rules include those of the other schemes


def _tag(tag: Any, names: Sequence[str]) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if not 0 <= tag < len(names):
            known = f"the names are {len(names)}" if names else "name them in order: --tag-names O,B-PER,I-PER,..."
            raise ValueError(f"the tag {tag} is a number without a name; {known}")
        tag = names[tag]
    if not isinstance(tag, str):
        raise TypeError(f"a tag is a {_type_name(tag)}, not a string or number")
    if not is_tag(tag) or not is_unicode(tag):
        raise ValueError(f"the tag {tag!r} is of no known scheme; write IOB1, IOB2 or BIOES (O, B-PER, I-PER ...)")
    return tag


def _type_name(value: Any) -> str:
    return _TYPES.get(type(value), "null" if value is None else type(value).__name__)
