"""Readers of two foreign formats, CSV tables and web archives, with the same interface as those of readers.py:

    reader(stream, bad) yields (number, row)

stream: binary, already uncompressed. row: a dict, still to be given to `adapters.adapt`. What cannot be read goes to
bad(number, reason, head, error), and the stream goes on. A damaged .gz raises EOFError, OSError or
zlib.error out of the generator, as it does out of those of readers.py.
"""
import csv
import re
import zlib
from collections import deque
from io import BytesIO

from nanollm.config import UserError
from nanollm.corpus.adapters import PAGES
from nanollm.corpus.edits import markup
from nanollm.corpus.readers import MAX_LINE, numbered_lines

# ---- CSV -------------------------------------------------------------------------------------------------------------


def fields_of(lines, delimiter):
    """The fields of one record that takes all of `lines` (bytes); ValueError(why) if it does not. Read as Latin-1, which
    has a character for every byte: so the shape of a record does not depend on whether its text is proper UTF-8."""
    reader = csv.reader([line.decode("latin-1") for line in lines], delimiter=delimiter, strict=True)
    try:
        fields = next(reader)
    except csv.Error as e:
        raise ValueError(str(e)) from None
    if reader.line_num < len(lines):
        raise ValueError("a quote inside a field")
    return fields


def records(numbered, delimiter):
    """(number, raw, fields or None, error) of each record in numbered lines; blank lines are nothing.

    A quoted field may hold line ends: a record whose first line leaves a quote open goes on until its quotes are even
    (RFC 4180, section 2). A quote that is never closed must not swallow the file: then the first line alone is given
    up, and reading goes on with the second. So a line is looked at twice at most, as those after an open one are even.
    """
    again = deque()

    def following():
        return again.popleft() if again else next(numbered, None)

    while line := following():
        number, block = line[0], [line[1]]
        if not line[1].strip():
            continue
        try:
            yield number, line[1], fields_of(block, delimiter), ""
            continue
        except ValueError as e:
            error = e
        taken, size, odd = [], len(block[0]), block[0].count(b'"') % 2
        while odd and size < MAX_LINE and (line := following()):
            taken.append(line)
            size, odd = size + len(line[1]), odd ^ line[1].count(b'"') % 2
        try:
            block += [raw for _, raw in taken]
            yield number, b"".join(block), fields_of(block, delimiter), ""
        except ValueError:
            again.extendleft(reversed(taken))
            yield number, block[0], None, error


def read_csv(stream, bad, delimiter=","):
    """(line, {column: text}) of each record of a UTF-8 CSV file whose first record names the columns. To quarantine:
    broken_csv (quotes), wrong_fields (not as many as there are columns), not_utf8."""
    csv.field_size_limit(MAX_LINE)                     # the default of 128 KiB is less than a long document
    header = None
    for number, raw, fields, error in records(numbered_lines(stream, bad), delimiter):
        try:
            fields = fields and [field.encode("latin-1").decode("utf-8") for field in fields]
        except UnicodeDecodeError as e:
            bad(number, "not_utf8", raw, f"{e}; convert the file to UTF-8")
            continue
        if fields is None:
            bad(number, "broken_csv", raw, error)
        elif header is None:
            header = fields
        elif len(fields) != len(header):
            bad(number, "wrong_fields", raw, f"{len(fields)} fields where the first line names {len(header)}")
        else:
            yield number, dict(zip(header, fields))


# ---- WARC and WET ----------------------------------------------------------------------------------------------------

DOCUMENTS = ("response", "resource", "conversion")        # the other types of ISO 28500 describe a crawl, not a page
CHARSET = re.compile(r"charset\s{0,9}=\s{0,9}[\"']?([\w.-]{1,40})", re.I)


def headers_of(lines):
    """{name in lower case: value} of header lines (bytes), of a WARC record or of HTTP."""
    pairs = (line.decode("utf-8", "replace").partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}


def warc_records(stream, bad):
    """(number, headers, block) of each record (ISO 28500: a version line, headers, a blank line, Content-Length bytes, two
    blank lines). A record whose length cannot be true is given up, and reading goes on at the next version line."""
    lines, again, number, lost = iter(lambda: stream.readline(MAX_LINE), b""), deque(), 0, False

    def following():
        return again.popleft() if again else next(lines, b"")

    while line := following():
        if not line.startswith(b"WARC/"):
            if line.strip() and not lost:                 # once for all that stands between two records
                number, lost = number + 1, True
                bad(number, "broken_record", line, "no WARC record begins here; skipped to the next")
            continue
        number, lost, head, taken, size = number + 1, False, [], [], 0
        while len(head) < 1000 and (line := following()).strip():
            head.append(line)
        headers = headers_of(head)
        length = headers.get("content-length", "")
        length = int(length) if re.fullmatch(r"[0-9]{1,12}", length) else MAX_LINE + 1
        while size < length <= MAX_LINE and (line := following()):
            taken.append(line)
            size += len(line)
        block = b"".join(taken)
        if size < length or block[length:].strip():
            again.extendleft(reversed(taken))
            lost = True
            bad(number, "broken_record", b"".join(head), "Content-Length is missing, too large or wrong")
        else:
            yield number, headers, block[:length]


def http_body(block):
    """(headers, status, body) of an HTTP response as it was sent: chunks joined (RFC 9112, 7.1), gzip and deflate undone.
    Raises ValueError if that cannot be done."""
    head, _, body = block.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = headers_of(lines)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        chunks, stream = [], BytesIO(body)
        while size := int(stream.readline(99).partition(b";")[0], 16):
            chunks.append(stream.read(size))
            stream.readline(99)
        body = b"".join(chunks)
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        try:
            body = zlib.decompressobj(wbits=47).decompress(body, MAX_LINE)       # 47: zlib's or gzip's header
        except zlib.error as e:
            raise ValueError(str(e)) from None
    elif encoding not in ("identity", ""):
        raise ValueError(f"Content-Encoding {encoding} is not known here")
    return headers, status.split(b" ")[1:2] == [b"200"], body


def decode(body, content_type):
    """Bytes as text: in the encoding that the header or the page names, else UTF-8, else GB 18030 (which holds GB 2312
    and GBK), else UTF-8 with U+FFFD for what is none."""
    named = CHARSET.search(content_type) or CHARSET.search(body[:2048].decode("latin-1"))
    named = "gb18030" if named and named[1].lower() in ("gb2312", "gbk") else named[1] if named else "utf-8"
    for encoding in (named, "utf-8", "gb18030"):
        try:
            return body.decode(encoding)
        except (ValueError, LookupError):
            pass
    return body.decode("utf-8", "replace")


def page_text(html):
    """The text of a page: the main content where trafilatura is installed (pip install -e '.[warc]'), else all that is
    no tag. The two differ, so one corpus should be read with one of them."""
    try:
        import trafilatura
    except ModuleNotFoundError:
        return markup(html)
    except ImportError as e:                              # half installed: not to be mistaken for absent
        raise UserError(f"trafilatura is installed but cannot be loaded: {e}; install what it misses, or uninstall it") from None
    return trafilatura.extract(html) or ""


def read_warc(stream, bad):
    """(number of the record, {"url", "mime", "ok", "text"}) of each page of a .warc and each text of a .wet file. What is
    no page (an image, say) has no text and is dropped by its adapter. To quarantine: broken_record."""
    for number, headers, block in warc_records(stream, bad):
        if headers.get("warc-type") not in DOCUMENTS:
            continue
        try:
            http, ok, body = http_body(block) if headers["warc-type"] == "response" else (headers, True, block)
        except ValueError as e:
            bad(number, "broken_record", block, e)
            continue
        content_type = http.get("content-type", "")
        mime = content_type.partition(";")[0].strip().lower()
        text = decode(body, content_type) if mime in PAGES else ""
        yield number, {"url": headers.get("warc-target-uri", ""), "mime": mime, "ok": ok,
                       "text": text if mime == "text/plain" else page_text(text)}
