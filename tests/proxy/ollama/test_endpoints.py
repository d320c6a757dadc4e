"""Reading and editing requests: what is found, and that not one other byte changes."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.jsonedit import DEPTH_LIMIT, MEMBER_LIMIT, JsonError, decode, edit, members, splice
from proxy.ollama import endpoints
from proxy.ollama.endpoints import QUOTE_LIMIT, kind_of, parse_load_request

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)
objects = st.dictionaries(st.text(), values, max_size=6)
layouts = st.sampled_from(
    [{}, {"indent": 2}, {"separators": (",", ":")}, {"separators": (" ,\n", "\t: ")}, {"ensure_ascii": False}]
)


def write(value, layout):
    return json.dumps(value, **layout).encode("utf-8", "surrogatepass")


@given(objects, layouts, st.sampled_from([b"", b" \r\n\t"]))
def test_members_agree_with_json(value, layout, blank):
    # shows: keys, order and values are those that json finds, whatever the layout
    text = blank + write(value, layout) + blank
    found = members(text, len(blank))
    assert [(member.key, json.loads(text[member.value_start : member.end])) for member in found] == list(value.items())
    assert all(text[member.start : member.start + 1] == b'"' for member in found)


@given(objects, layouts, st.data())
def test_an_edit_changes_what_it_is_told_and_nothing_else(value, layout, data):
    # shows: the result is valid, has exactly the wanted members, and every kept member's very bytes
    text = write(value, layout)
    found = members(text)
    gone = {member for member in found if data.draw(st.booleans())}
    add = data.draw(st.dictionaries(st.sampled_from(["put in 1", "put in 2"]), st.integers() | st.text()))
    after = splice(text, edit(0, found, remove=gone, add=add))
    kept = [member for member in found if member not in gone]
    assert json.loads(after, object_pairs_hook=list) == json.loads(
        json.dumps({**add, **{member.key: value[member.key] for member in kept}}), object_pairs_hook=list
    )
    for member in kept:
        assert text[member.start : member.end] in after
    if not gone and not add:
        assert after == text


@given(objects, st.data())
def test_a_text_cut_off_anywhere_is_not_understood(value, data):
    text = write(value, {})
    with pytest.raises(JsonError):
        members(text[: data.draw(st.integers(0, len(text) - 1))])


@given(st.binary(max_size=60))
def test_any_bytes_are_understood_or_refused(text):
    try:
        members(text)
    except JsonError:
        return


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
        b'{"a":[1}',
        b'{"a":tru}',
        b'{"a":01}',
        b"{'a':1}",
    ],
)
def test_what_is_no_object_is_refused(text):
    with pytest.raises(JsonError):
        members(text)


def test_absurd_nesting_is_refused_quickly():
    with pytest.raises(JsonError):
        members(b'{"a":' + b"[" * (DEPTH_LIMIT + 1))


def test_an_absurd_number_is_refused_quickly():
    # shows: nobody waits while one client's number is looked through (10 ms; trying each of its parts anew would take hours)
    start = time.thread_time()
    with pytest.raises(JsonError, match="expected a value"):
        parse_load_request("/api/chat", b'{"a":' + b"1" * 5_000_000 + b"x}")
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (b'{"a":1' + b',"a":1' * 500_000 + b"}", f"more than {MEMBER_LIMIT} members"),
        (b'{"model":"m","messages":[{}' + b',{"":"","":""}' * 1_500_000 + b"]}", f"more than {QUOTE_LIMIT} quotes"),
        (
            b'{"model":"m"' + (b',"options":{"top_k":0' + b',"main_gpu":0' * 9000 + b"}") * 200 + b"}",
            f"more than {MEMBER_LIMIT} options",
        ),
    ],
    ids=["members", "messages", "options"],
)
def test_absurd_counts_are_refused_at_a_limit(text, refusal):
    # shows: nobody waits while one client's text is looked through to its end (without care: a second each)
    with pytest.raises(JsonError, match=refusal):
        parse_load_request("/api/chat", text)


def test_many_options_beside_a_large_image_cost_one_copy_of_the_body(monkeypatch):
    copies = []
    monkeypatch.setattr(endpoints, "splice", lambda *arguments: copies.append(1) or splice(*arguments))
    body = b'{"model":"m","images":["' + b"x" * 5_000_000 + b'"]' + b',"options":{"main_gpu":0}' * 9000 + b"}"
    changed = parse_load_request("/api/chat", body).with_options({"main_gpu": 1})
    assert changed.count(b"main_gpu") == 1
    assert len(copies) == 1


def test_escaped_quotes_and_backslashes_end_no_string():
    text = rb'{"a\"b\\":"x\\\"y\\","c":{"d":"}]\\"}}'
    assert [(member.key, decode(text, member)) for member in members(text)] == [('a"b\\', 'x\\"y\\'), ("c", {"d": "}]\\"})]


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/api/generate", "load"),
        ("POST", "/api/chat", "load"),
        ("POST", "/api/embed", "load"),
        ("POST", "/api/embeddings", "load"),
        ("GET", "/api/chat", "other"),
        ("POST", "/api/chat/", "other"),
        ("POST", "/v1/chat/completions", "v1"),
        ("POST", "/v1/messages", "v1"),
        ("GET", "/v1/models", "list"),
        ("HEAD", "/api/tags", "list"),
        ("HEAD", "/api/ps", "other"),
        ("POST", "/api/pull", "store"),
        ("DELETE", "/api/delete", "store"),
        ("POST", "/api/show", "other"),
    ],
)
def test_endpoints_are_told_apart(method, path, kind):
    assert kind_of(method, path) == kind


def parse(body, path="/api/generate"):
    return parse_load_request(path, body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"model":"m"}', b'{"options":{"main_gpu":1},"model":"m"}'),
        (b'{"model":"m","options":{}}', b'{"model":"m","options":{"main_gpu":1}}'),
        (b'{"model":"m","options":null}', b'{"model":"m","options":{"main_gpu":1}}'),
        (  # what the null has thrown away must not come back
            b'{"model":"m","options":{"num_ctx":8},"options":null}',
            b'{"model":"m","options":{"num_ctx":8},"options":null,"options":{"main_gpu":1}}',
        ),
        (b'{"model":"m","options":{"seed":1}}', b'{"model":"m","options":{"main_gpu":1,"seed":1}}'),
        (b'{"model":"m","options":{"main_gpu":0}}', b'{"model":"m","options":{"main_gpu":1}}'),
        (b'{"model":"m","options":{"a":1,"main_gpu":0}}', b'{"model":"m","options":{"main_gpu":1,"a":1}}'),
        (b'{"model":"m","options":{"main_gpu":0,"a":1}}', b'{"model":"m","options":{"main_gpu":1,"a":1}}'),
        (b'{"model":"m","options":{"a":1.50, "main_gpu" : 0 ,"b":2}}', b'{"model":"m","options":{"main_gpu":1,"a":1.50, "b":2}}'),
        (b'{"OPTIONS":{"a":1},"Model":"m"}', b'{"OPTIONS":{"main_gpu":1,"a":1},"Model":"m"}'),
        (
            b'{"options":{"main_gpu":0},"model":"m","options":{"b":1}} trailing',
            b'{"options":{},"model":"m","options":{"main_gpu":1,"b":1}} trailing',
        ),
        (
            b'{"model":"m","prompt":"\xff\xfe \\u0000","x":1e5}',
            b'{"options":{"main_gpu":1},"model":"m","prompt":"\xff\xfe \\u0000","x":1e5}',
        ),
    ],
)
def test_options_are_put_in_without_touching_another_byte(body, after):
    assert parse(body).with_options({"main_gpu": 1}, without=frozenset({"main_gpu"})) == after


@pytest.mark.parametrize("zero", [b"0", b"-0", b"0.0", b"0e9"])
def test_a_main_gpu_of_zero_is_taken_out(zero):
    request = parse(b'{"model":"m","options":{"main_gpu":' + zero + b',"seed":1}}')
    assert request.options == {"main_gpu": 0}
    assert request.with_options({}, without=frozenset({"main_gpu"})) == b'{"model":"m","options":{"seed":1}}'


def test_without_a_change_the_body_is_the_very_same():
    body = b' {"model" :"m", "options":{"num_ctx":4.0960e3}} \n'
    request = parse(body)
    assert request.with_options({}) is body
    assert request.options == {"num_ctx": 4096}


def test_options_of_several_objects_add_up_and_null_starts_anew():
    # shows: as Go's encoding/json fills a map
    assert parse(b'{"model":"m","options":{"num_gpu":1},"Options":{"num_ctx":2}}').options == {"num_gpu": 1, "num_ctx": 2}
    assert parse(b'{"model":"m","options":{"num_gpu":1},"options":null,"options":{"num_ctx":2}}').options == {"num_ctx": 2}
    assert parse(b'{"model":"a","model":"b"}').model == "b"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model": ',
        b'{"prompt":"x"}',
        b'{"model":5}',
        b'{"model":""}',
        b'{"model":"m","options":[]}',
        b'{"model":"m","options":"x"}',
        b'{"model":"m","options":{"num_gpu":"many"}}',
        b'{"model":"m","options":{"num_gpu":true}}',
        b'{"model":"m","options":{"num_ctx":1e300}}',
        b'{"model":"m","options":{"num_ctx":99999999999999999999}}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"model":"' + b"m" * 5000 + b'"}',
    ],
)
def test_what_ollama_would_refuse_is_not_understood(body):
    with pytest.raises(JsonError):
        parse(body)


@pytest.mark.parametrize(
    ("path", "body", "unloads"),
    [
        ("/api/generate", {"keep_alive": 0}, True),
        ("/api/generate", {"keep_alive": "0s", "prompt": ""}, True),
        ("/api/generate", {"keep_alive": "0m0.0s"}, True),
        ("/api/chat", {"keep_alive": 0, "messages": []}, True),
        ("/api/generate", {"keep_alive": 0, "prompt": "x"}, False),
        ("/api/chat", {"keep_alive": 0, "messages": [{}]}, False),
        ("/api/generate", {"keep_alive": "5m"}, False),
        ("/api/generate", {"keep_alive": -1}, False),
        ("/api/generate", {}, False),
        ("/api/embed", {"keep_alive": 0, "input": ""}, False),
    ],
)
def test_a_request_to_unload_is_known(path, body, unloads):
    assert parse({"model": "m", **body}, path).unloads is unloads


@pytest.mark.parametrize("keep_alive", ["00s" * 1000 + "x", "0" * 4000 + "x", "0.0m0" * 500 + "-", "0" * 4000 + "s"])
def test_a_strange_keep_alive_takes_no_time(keep_alive):
    # shows: the pattern never goes back over zeros that could be split in several ways (30 groups would take minutes)
    start = time.thread_time()
    assert parse({"model": "m", "keep_alive": keep_alive}).unloads is (keep_alive[-1] == "s")
    assert time.thread_time() - start < 0.1
