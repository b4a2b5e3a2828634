"""Files of the kinds that curation reads, made by the tests that read them."""

import gzip
import io
import os
import struct
import subprocess

import pypdf
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject, NumberObject


def pdf(*pages, title="", password=None):
    """A PDF file with the lines of each page set in Helvetica."""
    writer = pypdf.PdfWriter()
    for lines in pages:
        page = writer.add_blank_page(612, 792)
        font = DictionaryObject(
            {NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")}
        )
        font[NameObject("/BaseFont")] = NameObject("/Helvetica")
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        shown = "".join(f"({line}) Tj 0 -14 Td " for line in lines)
        stream.set_data(f"BT /F1 12 Tf 72 700 Td {shown} ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def slow_lzw(size):
    """So many bytes of LZW, of which pypdf takes a second for each megabyte before it finds them damaged."""
    # Codes of nine bits: "clear the table" and a letter, again and again; at the end two codes that no table has.
    cleared, damaged = (
        sum(code << 9 * (7 - n) for n, code in enumerate(codes)).to_bytes(9, "big")
        for codes in ([256, 65] * 4, [256, 300, 301, 301] * 2)
    )
    return cleared * (size // 9) + damaged


def scanned_pdf(*pages):
    """A PDF file whose pages show pictures: each a list of (bytes, width, height), JPEG or else eight-bit grey.

    Equal pictures are one in the file.
    """
    writer, known = pypdf.PdfWriter(), {}
    for pictures in pages:
        page, shown = writer.add_blank_page(612, 792), DictionaryObject()
        for n, (data, width, height) in enumerate(pictures):
            picture = DecodedStreamObject()
            picture.set_data(data)
            if data.startswith(b"\xff\xd8\xff"):
                picture[NameObject("/Filter")] = NameObject("/DCTDecode")
            for name, value in (("/Width", width), ("/Height", height), ("/BitsPerComponent", 8)):
                picture[NameObject(name)] = NumberObject(value)
            for name, value in (("/Subtype", "/Image"), ("/ColorSpace", "/DeviceGray")):
                picture[NameObject(name)] = NameObject(value)
            shown[NameObject(f"/Im{n}")] = known.get(data) or writer._add_object(picture)
            known[data] = shown.raw_get(f"/Im{n}")
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/XObject"): shown})
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def warc(*records):
    """A WARC file of (type, url, content type, body)."""
    out = b""
    for kind, url, content_type, body in records:
        http = b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type + b"\r\n\r\n" + body
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\n"
            f"WARC-Record-ID: <urn:uuid:{len(out):08x}-0000-0000-0000-000000000000>\r\n"
            f"WARC-Date: 2026-01-02T03:04:05Z\r\nWARC-Target-URI: {url}\r\n"
            f"Content-Type: application/http; msgtype={kind}\r\nContent-Length: {len(http)}\r\n\r\n"
        )
        out += gzip.compress(head.encode() + http + b"\r\n\r\n")
    return out


def git(folder, *arguments):
    """Runs git without settings of the machine; returns what it prints."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def fasttext_model(words, classes, inputs, outputs):
    """A supervised softmax model of fastText's format 12: inputs float32 [W, D], outputs float32 [C, D]."""
    arguments = (inputs.shape[1], 5, 5, 1, 5, 1, 3, 3, 0, 0, 0, 100)
    entries = [(word, 0) for word in words] + [(name, 1) for name in classes]
    content = struct.pack("<ii12id", 793712314, 12, *arguments, 1e-4)
    content += struct.pack("<iiiqq", len(entries), len(words), len(classes), 99, -1)
    content += b"".join(
        word.encode() + b"\0" + struct.pack("<qb", 9 - n, kind) for n, (word, kind) in enumerate(entries)
    )
    for matrix in (inputs, outputs):
        content += b"\0" + struct.pack("<qq", *matrix.shape) + matrix.astype("<f4").tobytes()
    return content
