"""The GGUF reader: right files read right, wrong ones refused with a reason, none walked without bounds."""

from __future__ import annotations

import io
import os
import struct
import time
from contextlib import suppress

import gguf as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.profile import Tensor
from planner.quantization import ggml_type
from proxy.errors import GgufError, ModelError
from proxy.models.bounded import MAX_HEADER_BYTES
from proxy.models.gguf import MAX_ARRAY_KEPT, GgufHeader, parse_header, read_header, read_profile
from tests.gguf_files import LLAMA, TENSORS, U32, gguf, head, pair, string, tensor


def parse(data: bytes, file_bytes: int | None = None) -> GgufHeader:
    return parse_header(io.BytesIO(data), len(data) if file_bytes is None else file_bytes)


def refused(data: bytes, file_bytes: int | None = None) -> str:
    with pytest.raises(GgufError) as caught:
        parse(data, file_bytes)
    return str(caught.value)


def test_reads_metadata_and_tensor_table():
    """Scalars, a per-layer array, tensors with their offsets; the long vocabulary is left out."""
    data = gguf()
    header = parse(data)
    assert header.version == 3
    assert header.metadata == {k: tuple(v) if isinstance(v, list) else v for k, v in LLAMA.items() if "tokens" not in k}
    assert header.tensors == tuple(Tensor(name=n, type=ggml_type(t), shape=s) for n, t, s in TENSORS)
    assert header.offsets[0] == 0
    assert all(b >= a + t.bytes for a, b, t in zip(header.offsets, header.offsets[1:], header.tensors, strict=False))
    assert (header.file_bytes, header.header_only, header.kind) == (len(data), False, "model")


def test_agrees_with_the_reference_reader_on_every_tensor(smollm2_path):
    """SmolLM2-135M: name, type, shape, bytes and place of all 272 tensors as the ``gguf`` package reads them."""
    header = read_header(smollm2_path)
    theirs = reference.GGUFReader(smollm2_path)
    assert len(header.tensors) == len(theirs.tensors) == 272
    for tensor_, offset, other in zip(header.tensors, header.offsets, theirs.tensors, strict=True):
        assert tensor_.name == other.name
        assert tensor_.type.name == other.tensor_type.name
        assert tensor_.shape == tuple(int(n) for n in other.shape)
        assert tensor_.bytes == other.n_bytes
        assert header.data_offset + offset == other.data_offset
    for key, kept in header.metadata.items():
        found = theirs.fields[key].contents()
        assert kept == (tuple(found) if isinstance(found, list) else pytest.approx(found) if isinstance(found, float) else found)
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} - set(header.metadata) == {
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
    }
    profile = read_profile(smollm2_path)
    assert (profile.n_layers, profile.vocab_size, profile.file_bytes) == (30, 49152, smollm2_path.stat().st_size)
    assert sum(t.bytes for t in profile.tensors) == sum(int(t.n_bytes) for t in theirs.tensors)


def test_agrees_with_the_reference_writer(tmp_path):
    """A file that the ``gguf`` package wrote, with a value of every scalar type."""
    path = tmp_path / "written.gguf"
    writer = reference.GGUFWriter(path, "llama")
    numbers = {"uint8": 200, "int8": -7, "uint16": 60000, "int16": -300, "int32": -70000, "uint64": 2**60, "int64": -(2**60)}
    for kind, number in numbers.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", number)
    writer.add_float64("test.float64", 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_header(path)
    assert {f"test.{kind}": number for kind, number in numbers.items()}.items() <= header.metadata.items()
    assert header.metadata["test.float64"] == 0.1
    assert header.kind == "vocabulary"


def test_header_only_files_are_accepted_and_said_to_be_such(tmp_path):
    """A file that ends after its tensor table, with and without padding, counts as the size that its table implies."""
    whole = gguf()
    table_end = len(gguf(data=False))
    for end in (table_end, parse(whole).data_offset):
        header = parse(whole[:end])
        assert header.header_only
        assert header.file_bytes == len(whole)
    path = tmp_path / "header.gguf"
    path.write_bytes(whole[:table_end])
    assert read_profile(path).file_bytes == len(whole)


def test_a_file_cut_at_any_byte():
    """Inside the header and inside the tensor data: an error that says which, and how many bytes are missing."""
    whole = gguf({**LLAMA, "tokenizer.ggml.tokens": ["a", "bc"] * (MAX_ARRAY_KEPT // 2 + 1)})
    table_end = len(gguf({**LLAMA, "tokenizer.ggml.tokens": ["a", "bc"] * (MAX_ARRAY_KEPT // 2 + 1)}, data=False))
    header = parse(whole)
    end = header.data_offset + header.offsets[-1] + header.tensors[-1].bytes
    for cut in range(len(whole)):
        if cut < table_end:
            assert "ends inside its header" in refused(whole[:cut])
        elif cut <= header.data_offset:
            assert parse(whole[:cut]).header_only
        elif cut < end:
            assert f"{end - cut:,} are missing" in refused(whole[:cut])
        else:
            assert parse(whole[:cut]).tensors == header.tensors


def test_a_file_that_shrinks_while_it_is_read():
    """The size was asked first and the bytes are no longer there: refused, whatever was being read."""
    whole = gguf(data=False)
    for cut in range(0, len(whole), 97):
        assert "ends inside its header" in refused(whole[:cut], file_bytes=len(whole))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the magic"),
        (b"GGML" + bytes(60), "no GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(60), "GGUF version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (head(keys=2**60), "metadata keys"),
        (head(tensors=2**60), "tensors"),
        (head(tensors=2**64 - 1, keys=2**64 - 1), "metadata keys"),
        (head(keys=1) + struct.pack("<Q", 2**60) + bytes(40), "a metadata key"),
        (head(keys=1) + struct.pack("<Q", 2**64 - 1) + bytes(40), "a metadata key"),
        (head(keys=1) + string("k") + struct.pack("<IQ", 8, 2**63) + bytes(9), "k at byte"),
        (head(keys=1) + string("k") + struct.pack("<I", 99) + bytes(9), "unknown value type 99"),
        (head(keys=1) + string("k") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(9), "elements of k"),
        (head(keys=1) + string("k") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(9), "elements of k"),
        (head(keys=1) + string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "array of arrays"),
        (head(keys=1) + string("k") + struct.pack("<IIQ", 9, 42, 1) + bytes(40), "unknown value type 42"),
        (head(keys=2) + pair("k", 1) + pair("k", 2), "k twice"),
        (head(keys=1, tensors=0) + pair("general.alignment", 24), "power of two"),
        (head(keys=1, tensors=0) + pair("general.alignment", 0), "power of two"),
        (head(keys=1, tensors=0) + pair("general.alignment", "x"), "power of two"),
        (head(tensors=1) + string("t") + struct.pack("<I", 5) + bytes(80), "5 dimensions"),
        (head(tensors=1) + string("t") + struct.pack("<I", 2**32 - 1) + bytes(80), "dimensions"),
        (head(tensors=1) + tensor("t", 777, (32,), 0), "type 777"),
        (head(tensors=1) + tensor("t", 4, (32,), 0), "type 4"),
        (head(tensors=1) + tensor("t", 0, (2**40, 2**40), 0), "cannot be"),
        (head(tensors=1) + tensor("t", 0, (2**63,), 0), "cannot be"),
        (head(tensors=1) + tensor("t", 0, (32,), 2**63), "cannot be"),
        (head(tensors=1) + tensor("t", 2, (33,), 0), "whole number of Q4_0 blocks"),
        (head(tensors=2) + tensor("t", 0, (32,), 0) + tensor("t", 0, (32,), 128), "twice"),
        (head(tensors=1) + tensor("t", 0, (2**40,), 0) + bytes(64), "are missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lengths_that_lie_and_types_that_do_not_exist(data, says):
    """Each is refused at once, with a message that names the thing."""
    started = time.thread_time()
    assert says in refused(data)
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize("length", [2**31, 2**62, 2**63 - 9, 2**63, 2**64 - 8, 2**64 - 1])
def test_a_string_beyond_the_file_inside_a_long_array(length):
    """The walk over a vocabulary is as bounded as the rest: also where a length would run over 64 bits."""
    count = MAX_ARRAY_KEPT + 1
    array = string("k") + struct.pack("<IIQ", 9, 8, count) + string("abc") * 700 + struct.pack("<Q", length) + bytes(8 * count)
    assert "k at byte" in refused(head(keys=1) + array)


def test_the_last_string_of_the_last_array_ends_beyond_the_file():
    """Nothing follows that would notice it."""
    count = MAX_ARRAY_KEPT + 1
    array = string("k") + struct.pack("<IIQ", 9, 8, count) + string("abc") * count
    assert "k at byte" in refused((head(keys=1) + array)[:-1])


def test_a_header_longer_than_any_real_one(tmp_path):
    """A sparse file of 1 TB whose vocabulary claims half of it: refused by the bound on headers, without reading on."""
    path = tmp_path / "huge.gguf"
    path.write_bytes(head(keys=1) + string("k") + struct.pack("<IIQ", 9, 8, 2**36))
    os.truncate(path, 2**40)
    with pytest.raises(GgufError, match=f"longer than {MAX_HEADER_BYTES // 2**20} MiB"):
        read_header(path)


@given(st.integers(0, len(gguf(data=False)) - 1), st.binary(min_size=1, max_size=12))
def test_any_damage_ends_in_a_header_or_in_an_error(at, damage):
    """Bytes overwritten anywhere in the header: never another exception, never more than a moment."""
    data = bytearray(gguf())
    data[at : at + len(damage)] = damage
    with suppress(GgufError):
        header = parse(bytes(data))
        _ = header.kind, header.is_embedding, header.split_count, header.split_index


@given(st.binary(max_size=400))
def test_any_bytes_after_the_magic(tail):
    """Noise of any length is an error, not a crash."""
    with suppress(GgufError):
        parse(b"GGUF\x03\0\0\0" + tail)


def test_the_vocabulary_of_a_70b_is_walked_fast_enough(tmp_path):
    """Llama 3.3's 128 256 tokens and 280 147 merges in a file of 40 GB: under 50 ms of CPU, the best of five."""
    path = tmp_path / "70b.gguf"
    tokens = b"".join(string("Ġtoken"[: 1 + i % 6]) for i in range(128_256))
    merges = b"".join(string("Ġa token"[: 3 + i % 5]) for i in range(280_147))
    rows, offset = b"", 0
    for layer in range(80):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"):
            rows += tensor(f"blk.{layer}.{name}.weight", 12, (8192, 12000), offset)
            offset += 8192 * 12000 // 256 * 144
    data = head(keys=3, tensors=720) + pair("general.architecture", "llama")
    data += string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 128_256) + tokens
    data += string("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, 280_147) + merges + rows
    path.write_bytes(data)
    os.truncate(path, len(data) + 32 + offset)
    assert path.stat().st_size > 39e9
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        assert len(read_header(path).tensors) == 720
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.050


def test_arrays_are_kept_up_to_a_length():
    """A per-layer array stays, a vocabulary of numbers is stepped over, and what follows is still read."""
    metadata = {"general.architecture": "llama", "kept": [1] * MAX_ARRAY_KEPT, "skipped": [1] * (MAX_ARRAY_KEPT + 1), "after": 5}
    assert set(parse(gguf(metadata)).metadata) == {"general.architecture", "kept", "after"}


@pytest.mark.parametrize(
    ("metadata", "tensors", "kind"),
    [
        ({"general.architecture": "llama"}, TENSORS, "model"),
        ({"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}, TENSORS, "adapter"),
        ({"general.architecture": "llama", "adapter.type": "lora"}, TENSORS, "adapter"),
        ({"general.architecture": "clip", "clip.has_vision_encoder": True}, TENSORS, "projector"),
        ({"general.architecture": "clip", "general.type": "mmproj"}, TENSORS, "projector"),
        ({"general.architecture": "llama"}, [], "vocabulary"),
    ],
)
def test_what_a_file_is_for(tmp_path, metadata, tensors, kind):
    """Adapters, projectors and bare vocabularies are recognised, and refused as models with the reason."""
    path = tmp_path / "file.gguf"
    path.write_bytes(gguf(metadata, tensors))
    assert read_header(path).kind == kind
    if kind != "model":
        with pytest.raises(ModelError, match="not a language model"):
            read_profile(path)


@pytest.mark.parametrize(
    ("metadata", "embedding"),
    [
        ({"general.architecture": "bert"}, True),
        ({"general.architecture": "gemma-embedding"}, True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3}, True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 0}, True),
        ({"general.architecture": "llama"}, False),
    ],
)
def test_embedding_models(metadata, embedding):
    """By a pooling type, though it be none, or by an encoder's architecture."""
    assert parse(gguf(metadata)).is_embedding is embedding


def test_no_language_model(tmp_path):
    """Tensors without layers, or no architecture: said as such, not as damage."""
    path = tmp_path / "file.gguf"
    for metadata, tensors in (({"general.architecture": "flux"}, TENSORS[:1]), ({"k": 1}, TENSORS)):
        path.write_bytes(gguf(metadata, tensors))
        with pytest.raises(ModelError, match="no language model"):
            read_profile(path)


@pytest.fixture
def parts(tmp_path):
    """A model split into three files, as ``llama-gguf-split`` names and numbers them."""
    paths = [tmp_path / f"small-{i + 1:05}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        numbers = {"split.no": i, "split.count": 3, "split.tensors.count": len(TENSORS)}
        path.write_bytes(gguf({**LLAMA, **numbers} if i == 0 else numbers, TENSORS[2 * i : 2 * i + 2]))
    return paths


def test_split_models_are_read_whole_from_any_part(parts):
    """Tensors of all parts, metadata of the first, and the bytes of all files."""
    profiles = [read_profile(path) for path in parts]
    assert profiles[0] == profiles[1] == profiles[2]
    assert [t.name for t in profiles[0].tensors] == [name for name, _, _ in TENSORS]
    assert profiles[0].file_bytes == sum(path.stat().st_size for path in parts)
    assert profiles[0].architecture == "llama"


@pytest.mark.parametrize("count", [2, 4, 10**5, 2**32 - 1])
def test_a_part_that_counts_other_parts_than_its_name_is_refused_at_once(parts, count):
    """Nothing is listed for a number that no name can have."""
    parts[0].write_bytes(gguf({"split.no": 0, "split.count": count}, TENSORS[:2]))
    with pytest.raises(GgufError, match=f"is part 1 of {count} of a split model"):
        read_profile(parts[0])


def test_many_missing_parts_are_not_all_named(tmp_path):
    """An error stays readable."""
    path = tmp_path / "m-00001-of-65535.gguf"
    path.write_bytes(gguf({"split.no": 0, "split.count": 65535}, TENSORS[:2]))
    with pytest.raises(GgufError, match=r"missing: m-00002-of-65535\.gguf") as caught:
        read_profile(path)
    assert len(str(caught.value)) < 500


def test_a_split_model_says_which_part_is_missing(parts, tmp_path):
    """A part that is not there, a part under a strange name, and parts that don't hold all tensors."""
    renamed = tmp_path / "blob"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(GgufError, match="part 1 of 3"):
        read_profile(renamed)
    parts[2].write_bytes(gguf({"split.no": 2, "split.count": 3}, TENSORS[4:5]))
    with pytest.raises(GgufError, match=r"hold 5 tensors, split\.tensors\.count says 6"):
        read_profile(parts[0])
    parts[1].unlink()
    with pytest.raises(GgufError, match=r"missing: small-00002-of-00003\.gguf"):
        read_profile(parts[0])


def test_files_that_cannot_be_opened(tmp_path):
    """No file, a folder, a file without permission: the path and the reason."""
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GgufError, match="no such file"):
            read_header(path)


def test_errors_name_the_file(tmp_path):
    """A message from inside a file begins with its name."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(head(keys=1) + string("k") + struct.pack("<I", U32))
    with pytest.raises(GgufError, match=r"^broken\.gguf: the file ends inside its header"):
        read_header(path)
