"""The endpoints that speak other vendors' shapes: OpenAI's ``/v1/*`` and Anthropic's ``/v1/messages`` .

They carry no ``options``: a model's own parameters and the server's defaults decide how it is loaded.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import count
from secrets import randbelow, token_hex
from typing import Any

from proxy.simulator import gojson
from proxy.simulator.answers import NO_EMBEDDINGS, call_id, chat_prompt, message_text, refuses_embeddings, vector_length
from proxy.simulator.exchange import Exchange, RequestError
from proxy.simulator.http import EVENTS, PLAIN_JSON, Response, json_response
from proxy.simulator.replies import Call, Prompt, count_tokens, embedding
from proxy.simulator.simulation import Answer
from proxy.simulator.store import Model, qualified

_SAMPLING = ("temperature", "top_p", "seed", "stop", "frequency_penalty", "presence_penalty")


async def models(exchange: Exchange) -> Response:
    """``GET /v1/models``."""
    return _json({"object": "list", "data": [_listed(one) for one in exchange.simulator.store]})


async def model(exchange: Exchange) -> Response:
    """``GET /v1/models/NAME``."""
    name = exchange.request.path.removeprefix("/v1/models/")
    found = exchange.simulator.store.find(name)
    if found is None:
        return openai_error(RequestError(404, f"model '{name}' not found"))
    return _json(_listed(found))


async def chat_completions(exchange: Exchange) -> Response:
    """``POST /v1/chat/completions``."""
    body = exchange.json_body()
    prompt = chat_prompt(body, "ChatCompletionRequest")
    if prompt is None:
        return openai_error(RequestError(400, "[] is too short - 'messages'"))
    prompt = _with_format(prompt, body.get("response_format"))
    found, answer = await _ask(exchange, body, prompt, limit=body.get("max_completion_tokens", body.get("max_tokens")))
    if prompt.tools and "tools" not in found.capabilities:
        return openai_error(RequestError(400, f"{qualified(found.name)} does not support tools"))
    head = {"id": f"chatcmpl-{randbelow(999)}", "object": "chat.completion", **_made(exchange, body)}
    calls = _openai_calls(answer.spoken.calls)
    reason = "tool_calls" if calls else answer.spoken.reason
    if not body.get("stream"):
        message = {"role": "assistant", "content": await exchange.simulator.whole(answer)} | (
            {"tool_calls": calls} if calls else {}
        )
        return _json({**head, "choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": _usage(answer)})
    head["object"] = "chat.completion.chunk"
    early = exchange.simulator.era == "runner"

    def delta(fields: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}

    async def events() -> AsyncGenerator[bytes, None]:
        first = True
        async for piece in exchange.simulator.pieces(answer):
            yield _event(delta({"role": "assistant", "content": piece} if first or early else {"content": piece}, None))
            first = False
        if calls:
            yield _event(delta({"role": "assistant", "content": "", "tool_calls": calls}, None))
        last = _event(delta({"role": "assistant", "content": ""} if early else {}, reason))
        if (body.get("stream_options") or {}).get("include_usage"):
            last += _event({**head, "choices": [], "usage": _usage(answer)})
        yield last + b"data: [DONE]\n\n"

    return Response(content_type=EVENTS, body=events())


async def completions(exchange: Exchange) -> Response:
    """``POST /v1/completions``."""
    body = exchange.json_body()
    text = body.get("prompt")
    prompt = Prompt(text=text[0] if isinstance(text, list) and text else str(text or ""))
    _, answer = await _ask(exchange, body, prompt, limit=body.get("max_tokens"))
    head = {"id": f"cmpl-{randbelow(999)}", "object": "text_completion", **_made(exchange, body)}

    def choice(piece: str, finish: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"text": piece, "index": 0, "finish_reason": finish}]}

    if not body.get("stream"):
        return _json({**choice(await exchange.simulator.whole(answer), answer.spoken.reason), "usage": _usage(answer)})

    async def events() -> AsyncGenerator[bytes, None]:
        async for piece in exchange.simulator.pieces(answer):
            yield _event(choice(piece, None))
        last = _event(choice("", answer.spoken.reason))
        if (body.get("stream_options") or {}).get("include_usage"):
            last += _event({**head, "choices": [], "usage": _usage(answer)})
        yield last + b"data: [DONE]\n\n"

    return Response(content_type=EVENTS, body=events())


async def embeddings(exchange: Exchange) -> Response:
    """``POST /v1/embeddings``."""
    body = exchange.json_body()
    found = exchange.find_model(body)
    texts = [body["input"]] if isinstance(body.get("input"), str) else body.get("input")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return openai_error(RequestError(400, "invalid input"))
    await exchange.lease(found, {"model": body["model"]})
    if refuses_embeddings(exchange, found):
        return openai_error(RequestError(501, NO_EMBEDDINGS))
    length = vector_length(found, body.get("dimensions"))
    vectors: list[Any] = [embedding(text, length, normalized=True) for text in texts]
    if body.get("encoding_format") == "base64":
        vectors = [base64.b64encode(struct.pack(f"<{length}f", *vector)).decode() for vector in vectors]
    data = [{"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(vectors)]
    tokens = sum(map(count_tokens, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "data": data, "model": body["model"], "usage": usage})


async def responses(exchange: Exchange) -> Response:
    """``POST /v1/responses``."""
    body = exchange.json_body()
    given = body.get("input")
    items = given if isinstance(given, list) else []
    text = given if isinstance(given, str) else "\n".join(message_text(i.get("content")) for i in items if isinstance(i, dict))
    _, answer = await _ask(exchange, body, Prompt(text=text), limit=body.get("max_output_tokens"))
    created = exchange.simulator.now_ns() // 10**9
    whole = _response(body, created)
    message = {"id": f"msg_{randbelow(10**6)}", "type": "message", "status": "completed", "role": "assistant"}
    done = {"status": "completed", "completed_at": created, "usage": _response_usage(answer)}
    if not body.get("stream"):
        output = [{**message, "content": [_output_text(await exchange.simulator.whole(answer))]}]
        return _json({**whole, **done, "output": output})

    async def events() -> AsyncGenerator[bytes, None]:
        number = count()

        def event(name: str, fields: Mapping[str, Any]) -> bytes:
            data = {**fields, "sequence_number": next(number), "type": f"response.{name}"}
            return f"event: response.{name}\ndata: ".encode() + gojson.encode(_sorted(data)) + b"\n\n"

        at = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        for name in ("created", "in_progress"):
            yield event(name, {"response": whole})
        yield event("output_item.added", {"item": {**message, "status": "in_progress", "content": []}, "output_index": 0})
        yield event("content_part.added", {**at, "part": _output_text("")})
        said = ""
        async for piece in exchange.simulator.pieces(answer):
            said += piece
            yield event("output_text.delta", {**at, "delta": piece, "logprobs": []})
        yield event("output_text.done", {**at, "text": said, "logprobs": []})
        yield event("content_part.done", {**at, "part": _output_text(said)})
        item = {**message, "content": [_output_text(said)]}
        yield event("output_item.done", {"item": item, "output_index": 0})
        yield event("completed", {"response": {**whole, **done, "output": [item]}})

    return Response(content_type=EVENTS, body=events())


def _response(body: Mapping[str, Any], created: int) -> dict[str, Any]:
    """A ``response`` that is under way, in the order of its fields."""
    return {
        "id": f"resp_{randbelow(10**6)}",
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": body["model"],
        "previous_response_id": None,
        "instructions": body.get("instructions"),
        "output": [],
        "error": None,
        "tools": body.get("tools") or [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "top_p": body.get("top_p", 1),
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_logprobs": 0,
        "temperature": body.get("temperature", 1),
        "reasoning": None,
        "usage": None,
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


def _response_usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "output_tokens": answer.spoken.count,
        "total_tokens": answer.prompt_tokens + answer.spoken.count,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _sorted(value: Any) -> Any:
    """Events of a streamed response are maps in Go: their keys are sorted."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


async def messages(exchange: Exchange) -> Response:
    """``POST /v1/messages``."""
    body = exchange.json_body()
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        return anthropic_error(RequestError(400, "max_tokens is required and must be positive"))
    prompt = chat_prompt(body, "MessagesRequest")
    if prompt is None:
        return anthropic_error(RequestError(400, "messages is required"))
    _, answer = await _ask(exchange, body, prompt, limit=body["max_tokens"])
    stop = "max_tokens" if answer.spoken.reason == "length" else "end_turn"
    head = {"id": f"msg_{token_hex(12)}", "type": "message", "role": "assistant", "model": body["model"]}
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.spoken.count}
    if not body.get("stream"):
        content = [{"type": "text", "text": await exchange.simulator.whole(answer)}]
        return _json({**head, "content": content, "stop_reason": stop, "usage": usage})

    async def events() -> AsyncGenerator[bytes, None]:
        estimate = {"input_tokens": max(count_tokens(prompt.text), 1), "output_tokens": 0}
        yield _named_event("message_start", {"message": {**head, "content": [], "usage": estimate}})
        yield _named_event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
        async for piece in exchange.simulator.pieces(answer):
            yield _named_event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece}})
        yield _named_event("content_block_stop", {"index": 0})
        yield _named_event("message_delta", {"delta": {"stop_reason": stop}, "usage": usage})
        yield _named_event("message_stop", {})

    return Response(content_type=EVENTS, body=events(), headers={"Cache-Control": "no-cache", "Connection": "keep-alive"})


def openai_error(problem: RequestError) -> Response:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(problem.status, "api_error")
    return _json({"error": {"message": problem.message, "type": kind, "param": None, "code": None}}, status=problem.status)


def anthropic_error(problem: RequestError) -> Response:
    """``{"type": "error", "error": {"type", "message"}}``."""
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(problem.status, "api_error")
    error = {"type": kind, "message": problem.message}
    return _json({"type": "error", "error": error, "request_id": f"req_{token_hex(12)}"}, status=problem.status)


async def _ask(exchange: Exchange, body: Mapping[str, Any], prompt: Prompt, *, limit: int | None) -> tuple[Model, Answer]:
    found = exchange.find_model(body)
    options = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    if limit is not None:
        options["num_predict"] = limit
    lease = await exchange.lease(found, {"model": body["model"], "options": options})
    return found, exchange.simulator.answer(found, lease, prompt, options)


def _with_format(prompt: Prompt, response_format: Any) -> Prompt:
    if not isinstance(response_format, dict):
        return prompt
    kind = response_format.get("type")
    schema = (response_format.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    wanted = schema or ("json" if kind == "json_object" else None)
    return Prompt(text=prompt.text, format=wanted, tools=prompt.tools, answers_tool=prompt.answers_tool)


def _openai_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {
            "id": call_id(name, arguments),
            "index": index,
            "type": "function",
            "function": {"name": name, "arguments": gojson.encode(arguments).decode()},
        }
        for index, (name, arguments) in enumerate(calls)
    ]


def _made(exchange: Exchange, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"created": exchange.simulator.now_ns() // 10**9, "model": body["model"], "system_fingerprint": "fp_ollama"}


def _usage(answer: Answer) -> dict[str, int]:
    prompt, said = answer.prompt_tokens, answer.spoken.count
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _listed(model: Model) -> dict[str, Any]:
    owner = qualified(model.name).split("/")[1]
    return {"id": model.name, "object": "model", "created": model.modified_ns // 10**9, "owned_by": owner}


def _json(value: Any, *, status: int = 200) -> Response:
    return json_response(value, status=status, content_type=PLAIN_JSON, newline=True)


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + gojson.encode(value) + b"\n\n"


def _named_event(name: str, fields: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: ".encode() + gojson.encode({"type": name, **fields}) + b"\n\n"
