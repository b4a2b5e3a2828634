"""L1: web pages to text, twice: a fast pass over everything, a careful one over what the rules in between leave.

Both keep structure: headings and list items are marked, preformatted text becomes a fenced block with its language,
and mathematics becomes TeX between dollars wherever the page carries it (MathML with an annotation, MathJax, KaTeX,
Wikipedia). The order is MegaMath's: the careful pass costs an order of magnitude more (benchmarks/curation_filters.py).
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.versions import installed
from davinci_jax.errors import ConfigError

if TYPE_CHECKING:
    from resiliparse.parse.html import DOMNode, HTMLTree

_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Codecs of the encodings that browsers know (https://encoding.spec.whatwg.org). Python has more, which no page is in:
# codecs of bytes, and punycode, whose time is quadratic. Of x-user-defined and "replacement" Python has none.
_WEB_CODECS = frozenset(
    {f"iso8859-{number}" for number in range(2, 17) if number != 12}
    | {f"cp{number}" for number in (866, 874, 932, 949, *range(1250, 1259))}
    | {"utf-8", "utf-16", "utf-16-le", "utf-16-be", "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "tis-620"}
    | {"gb2312", "gbk", "gb18030", "big5", "big5hkscs", "euc_jp", "iso2022_jp", "shift_jis", "euc_kr"}
)
_DEPTH = 400  # nested elements; beyond it extractors recurse too deep
_TAG = re.compile(rb"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*?(/?)>")
_VOID = frozenset(b"area base br col embed hr img input link meta param source track wbr p li dt dd tr td th".split())
_FORMULAS = ".mwe-math-element, mjx-container, .katex-display, .katex, math"
_LANGUAGE = re.compile(r"(?:^|\s)(?:language|lang|highlight|brush:?|sourceCode)[-\s:]([A-Za-z0-9+#]{1,20})(?:\s|$)")
_MENU = 0.6  # of a list's characters in links, above which it is a menu
_HIDDEN = "Qz7kXv"
_BLANK_LINES = re.compile(r"\n{3,}")


@dataclasses.dataclass(frozen=True)
class HtmlText:
    """Extracts the text of HTML bytes with resiliparse, fast.

    Attributes:
      main_content: whether navigation, footers and the like are left out.
      keep_raw: whether the bytes stay for a careful pass later in the recipe.
      max_bytes: a page with more is rejected unread.
    """

    main_content: bool = True
    keep_raw: bool = False
    max_bytes: int = 8 * 2**20
    name = "html-text"
    level = "L1"

    def __post_init__(self):
        if self.max_bytes < 1:
            raise ConfigError("html-text.max_bytes", self.max_bytes, "is no bound", "give a number of bytes")

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "extractor": installed(self.name, "resiliparse")}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            reason = unreadable(document.raw, self.max_bytes)
            if reason:
                reject(document, reason)
                continue
            tree = parse_page(document.raw, document.metadata.get("charset"))
            mark_structure(tree, keep_menus=not self.main_content)
            text = self._text(tree)
            if not text:
                reject(document, "no text")
                continue
            metadata = dict(document.metadata)
            if tree.title and "title" not in metadata:
                metadata["title"] = " ".join(tree.title.split())
            yield document.with_text(text, metadata=metadata, raw=document.raw if self.keep_raw else b"")

    def _text(self, tree: HTMLTree) -> str:
        from resiliparse.extract.html2text import extract_plain_text

        text = extract_plain_text(
            tree, preserve_formatting=True, main_content=self.main_content, alt_texts=False, list_bullets=False
        )
        return _tidy(text)


@dataclasses.dataclass(frozen=True)
class HtmlCareful:
    """Extracts the text of HTML bytes again with trafilatura, which tells text from its surroundings better.

    It wants the bytes, so the fast pass before it keeps them (`Step("html-text", keep_raw=True)`). Where a page is too
    long, or nothing comes out, the text of the fast pass stays, and `metadata["extraction"]` says so.

    Attributes:
      precision: whether a passage in doubt is left out.
      tables: whether tables are kept.
      max_bytes: a page with more keeps the text that it has.
    """

    precision: bool = False
    tables: bool = True
    max_bytes: int = 2 * 2**20
    name = "html-careful"
    level = "L1"

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "extractor": installed(self.name, "resiliparse", "trafilatura")}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            text = "" if unreadable(document.raw, self.max_bytes) else self._text(document)
            if not text and not document.text:
                reject(document, "no text" if document.raw else "no bytes: the pass before must keep them (keep_raw)")
                continue
            which = "careful" if text else "fast"
            metadata = {**document.metadata, "extraction": which}
            yield document.with_text(text or document.text, metadata=metadata)

    def _text(self, document: Document) -> str:
        import trafilatura

        tree = parse_page(document.raw, document.metadata.get("charset"))
        hidden = hide_structure(tree)
        text = trafilatura.extract(
            tree.document.html,
            output_format="markdown",
            include_comments=False,
            include_tables=self.tables,
            include_formatting=True,
            favor_precision=self.precision,
        )
        text = text or ""
        for word, plain in hidden.items():
            text = text.replace(word, plain)
        return _tidy(text)


def unreadable(raw: bytes, max_bytes: int) -> str | None:
    """Returns why bytes are not given to a parser: none, too many, or elements nested as in an attack."""
    if not raw.strip():
        return "empty"
    if len(raw) > max_bytes:
        return f"{len(raw)} bytes of HTML, above {max_bytes}"
    depth = deepest = 0
    if raw.count(b"<") > _DEPTH:
        for closing, tag, empty in _TAG.findall(raw):
            if empty or tag.lower() in _VOID:
                continue
            depth = max(depth - 1, 0) if closing else depth + 1
            deepest = max(depth, deepest)
    return f"elements nested {deepest} deep, above {_DEPTH}" if deepest > _DEPTH else None


def parse_page(raw: bytes, charset: object = None) -> HTMLTree:
    """Returns the tree of a page in the encoding that it is in: byte order mark, header, `meta`, UTF-8, a guess."""
    from resiliparse.parse.html import HTMLTree

    return HTMLTree.parse(decode(raw, charset).replace("\x00", ""))


def decode(raw: bytes, charset: object = None) -> str:
    """Returns bytes of a page as text; what the encoding does not know becomes U+FFFD."""
    from resiliparse.parse.encoding import detect_encoding

    for mark, encoding in _BOMS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace")
    declared = _CHARSET.search(raw[:4096])
    named = [charset] if isinstance(charset, str) else []
    named += [declared.group(1).decode("ascii")] if declared else []
    for encoding in (*named, "utf-8"):
        try:
            return raw.decode(_web_encoding(encoding))
        except (LookupError, ValueError):  # a name may hold a zero byte, and not every codec raises UnicodeDecodeError
            continue
    return raw.decode(detect_encoding(raw) or "cp1252", "replace")


def mark_structure(tree: HTMLTree, keep_menus: bool = True) -> None:
    """Writes headings, list items, preformatted text, code and formulas of a page as plain text marks, in place.

    Args:
      tree: the page.
      keep_menus: whether lists that are mostly links are marked too; the others resiliparse takes for no content.
    """
    if tree.body is None:
        return
    for node, formula in formulas(tree):
        _replace(tree, node, formula)
    for node, block in code_blocks(tree):
        node.replace_children(tree.create_text_node(block))
    # What stood in a block is plain text by now.
    for tag in ("code", "kbd", "samp", "tt"):
        for node in _elements(tree, tag):
            text = node.text
            if text.strip() and "`" not in text:
                node.replace_children(tree.create_text_node(f"`{text}`"))
    _mark_lists(tree, keep_menus)
    for number in range(1, 7):
        for node in _elements(tree, f"h{number}"):
            heading = " ".join(node.text.replace("¶", "").split())
            if heading:
                node.replace_children(tree.create_text_node(f"{'#' * number} {heading}"))


def _mark_lists(tree: HTMLTree, keep_menus: bool) -> None:
    """Writes a bullet or number before each item, and makes bulleted lists numbered ones.

    Of the two, resiliparse's main content leaves out every bulleted list (version 2.0.1), in the middle of a text too.
    """
    for node in _elements(tree, "ul"):
        links = sum(len(link.text) for link in node.get_elements_by_tag_name("a")[:] if link.text)
        if node.parent is None or (not keep_menus and links > _MENU * len(node.text)):
            continue
        numbered = tree.create_element("ol")
        for child in list(node.child_nodes[:]):
            if child.tag == "li":
                _begin(tree, child, "- ")
            numbered.append_child(child)
        node.parent.replace_child(numbered, node)
    for node in _elements(tree, "ol"):
        items = [child for child in node.child_nodes[:] if child.tag == "li"]
        for number, item in enumerate(items, 1):
            if not (item.text or "").startswith("- "):
                _begin(tree, item, f"{number}. ")


def _begin(tree: HTMLTree, item: DOMNode, mark: str) -> None:
    """Writes a mark before the text of a list item, within its first paragraph, which ends to be one."""
    first = item.first_element_child
    before = first.prev if first is not None else None
    if first is not None and first.tag == "p" and not (before is not None and (before.text or "").strip()):
        for child in list(first.child_nodes[:]):
            item.insert_before(child, first)
        item.remove_child(first)
    item.insert_before(tree.create_text_node(mark), item.first_child)


def hide_structure(tree: HTMLTree) -> dict[str, str]:
    """Puts a word in the place of every formula and block of code, which an extractor would spoil, in place.

    Returns the text that each word stands for; no page holds such a word by chance.
    """
    if tree.body is None:
        return {}
    hidden: dict[str, str] = {}
    for node, formula in formulas(tree):
        word = f"Formula{_HIDDEN}{len(hidden):06d}x"
        hidden[word] = formula
        _replace(tree, node, word)
    for node, block in code_blocks(tree):
        word = f"Block{_HIDDEN}{len(hidden):06d}x"
        for known, formula in hidden.items():
            block = block.replace(known, formula)
        hidden[word] = block
        paragraph = tree.create_element("p")
        paragraph.replace_children(tree.create_text_node(word))
        node.parent.replace_child(paragraph, node)
    return hidden


def formulas(tree: HTMLTree) -> list[tuple[DOMNode, str]]:
    """Returns the elements of the formulas of a page whose TeX it carries, with it between dollars."""
    found = []
    if tree.body.query_selector(_FORMULAS) is not None:
        found += [(node, tex) for node in tree.body.query_selector_all(_FORMULAS)[:] if (tex := _tex(node)) is not None]
    for node in _elements(tree, "script"):
        kind = node.getattr("type") or ""
        if kind.startswith("math/tex") and node.text.strip():
            mark = "$$" if "mode=display" in kind else "$"
            found.append((node, f"{mark}{node.text.strip()}{mark}"))
    return found


def code_blocks(tree: HTMLTree) -> list[tuple[DOMNode, str]]:
    """Returns the preformatted elements of a page with their text as fenced blocks."""
    found = []
    for node in _elements(tree, "pre"):
        code = node.text.strip("\n")
        if code.strip():
            found.append((node, f"```{_code_language(node)}\n{code}\n```"))
    return found


def _tex(node: DOMNode) -> str | None:
    """Returns the TeX of a formula's element with its dollars, `None` where there is none."""
    annotation = node.query_selector('annotation[encoding="application/x-tex"]')
    formula = node if node.tag == "math" else node.query_selector("math")
    tex = annotation.text if annotation is not None else formula.getattr("alttext") if formula is not None else None
    if not tex or not tex.strip():
        return None
    shown = "katex-display" in node.class_list or any(
        element is not None and (element.getattr("display") or "") in ("block", "true") for element in (node, formula)
    )
    mark = "$$" if shown else "$"
    return f"{mark}{tex.strip()}{mark}"


def _code_language(node: DOMNode) -> str:
    """Returns the language that a class of the block, its code or its frame names, "" if none does."""
    inner, frame = node.query_selector("code"), node.parent
    for element in (inner, node, frame, frame.parent if frame is not None else None):
        if element is not None:
            found = _LANGUAGE.search(element.getattr("class") or "")
            if found and found.group(1) not in ("default", "none", "text", "notranslate"):
                return found.group(1).lower()
    return ""


def _elements(tree: HTMLTree, tag: str) -> list[DOMNode]:
    # A copy: walking through the living collection looks for its elements anew at each step.
    return [node for node in tree.body.get_elements_by_tag_name(tag)[:] if node.text]


def _replace(tree: HTMLTree, node: DOMNode, text: str) -> None:
    # An element within one that was replaced has no parent any more.
    if node.parent is not None:
        node.parent.replace_child(tree.create_text_node(text), node)


def _web_encoding(name: str) -> str:
    """Returns the encoding that the web means by a name: Latin-1 and ASCII stand for Windows-1252.

    Raises:
      LookupError, ValueError: no encoding of the web has that name.
    """
    found = codecs.lookup(name.strip()).name
    if found in ("iso8859-1", "ascii"):
        return "cp1252"
    if found not in _WEB_CODECS:
        raise LookupError(f"{found} is no encoding of the web")
    return found


def _tidy(text: str) -> str:
    lines = (line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()
