"""Ollama's own endpoints that load a model: ``generate``, ``chat``, ``embed``, ``embeddings`` (``server/routes.go``)."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from proxy.simulator import gojson
from proxy.simulator.exchange import Exchange, keep_alive, unmarshal_error
from proxy.simulator.http import NDJSON, Response, error, json_response
from proxy.simulator.replies import Call, Prompt, count_tokens, embedding, token_ids
from proxy.simulator.store import Model, qualified

NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
"""llama-server's words for a model that only generates, from 0.30 on (recorded)."""


async def generate(exchange: Exchange) -> Response:
    """``POST /api/generate``: an answer, or a load (no prompt), or an unload (no prompt, ``keep_alive: 0``)."""
    body = exchange.json_body()
    text = body.get("prompt") or ""
    if not isinstance(text, str):
        raise unmarshal_error("GenerateRequest.prompt", "string", text)
    prompt = Prompt(text=text, format=body.get("format"))
    return await _speak(exchange, body, prompt if text else None, is_chat=False)


async def chat(exchange: Exchange) -> Response:
    """``POST /api/chat``: the same for a list of messages."""
    body = exchange.json_body()
    prompt = chat_prompt(body, "ChatRequest")
    if (
        prompt
        and prompt.tools
        and (model := exchange.simulator.store.find(body.get("model") or ""))
        and "tools" not in model.capabilities
    ):
        return error(400, f"{qualified(model.name)} does not support tools")
    return await _speak(exchange, body, prompt, is_chat=True)


async def embed(exchange: Exchange) -> Response:
    """``POST /api/embed``: unit vectors of one or several texts."""
    body = exchange.json_body()
    model = exchange.find_model(body)
    texts = body.get("input")
    if texts is None or isinstance(texts, str):
        texts = [texts] if texts else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return error(400, "invalid input type")
    lease = await exchange.lease(model, body)
    if refuses_embeddings(exchange, model):
        return error(501, NO_EMBEDDINGS)
    length = vector_length(model, body.get("dimensions"))
    load_ns = int(lease.load_s * 1e9) or 1_000_000
    tokens = sum(map(count_tokens, texts))
    prefill_ns = int(tokens / lease.runner.load.prefill_tokens_per_s * 1e9)
    return json_response(
        {
            "model": body["model"],
            "embeddings": [embedding(text, length, normalized=True) for text in texts],
            "total_duration": load_ns + prefill_ns,
            "load_duration": load_ns,
            "prompt_eval_count": tokens,
        }
    )


async def embeddings(exchange: Exchange) -> Response:
    """``POST /api/embeddings``: the older form, one text, not normalised."""
    body = exchange.json_body()
    model = exchange.find_model(body)
    await exchange.lease(model, body)
    if refuses_embeddings(exchange, model):
        return error(500, NO_EMBEDDINGS)
    text = str(body.get("prompt") or "")
    return json_response({"embedding": embedding(text, vector_length(model, None), normalized=False) if text else []})


def chat_prompt(body: Mapping[str, Any], struct: str) -> Prompt | None:
    """What a list of messages asks, ``None`` where there are none."""
    messages = body.get("messages") or []
    if not isinstance(messages, list):
        raise unmarshal_error(f"{struct}.messages", "[]api.Message", messages)
    if not messages:
        return None
    if not all(isinstance(message, dict) for message in messages):
        raise unmarshal_error(f"{struct}.messages", "api.Message", next(m for m in messages if not isinstance(m, dict)))
    return Prompt(
        text="\n".join(message_text(message.get("content")) for message in messages),
        format=body.get("format"),
        tools=tuple(tool for tool in body.get("tools") or () if isinstance(tool, dict)),
        answers_tool=messages[-1].get("role") == "tool",
    )


def message_text(content: Any) -> str:
    """The words of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def refuses_embeddings(exchange: Exchange, model: Model) -> bool:
    """From 0.30 on only embedding models embed."""
    return exchange.simulator.era == "llama-server" and not model.is_embedding


def vector_length(model: Model, dimensions: Any) -> int:
    """Length of an embedding, cut to ``dimensions`` where they are given and less."""
    length = model.profile.embedding_length
    return min(int(dimensions), length) if dimensions else length


def call_id(name: str, arguments: Mapping[str, Any]) -> str:
    """A made-up id of a tool call: eight characters."""
    return f"call_{hashlib.sha256(gojson.encode([name, arguments])).hexdigest()[:8]}"


def _said(is_chat: bool, text: str, calls: Sequence[Call] = ()) -> dict[str, Any]:
    """The words of an answer, in ``api.ChatResponse`` or ``api.GenerateResponse``."""
    if not is_chat:
        return {"response": text}
    called = [
        {"id": call_id(name, arguments), "function": {"index": index, "name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]
    return {"message": {"role": "assistant", "content": text} | ({"tool_calls": called} if called else {})}


async def _speak(exchange: Exchange, body: Mapping[str, Any], prompt: Prompt | None, *, is_chat: bool) -> Response:
    simulator = exchange.simulator
    model = exchange.find_model(body)

    def line(fields: Mapping[str, Any], **end: Any) -> dict[str, Any]:
        return {"model": body["model"], "created_at": gojson.timestamp(simulator.now_ns()), **fields, **(end or {"done": False})}

    if prompt is None and keep_alive(body) == 0:
        simulator.scheduler.expire(model)
        return json_response(line(_said(is_chat, ""), done=True, done_reason="unload"))
    if model.is_embedding:
        return error(400, f'"{body["model"]}" does not support {"chat" if is_chat else "generate"}')
    lease = await exchange.lease(model, body)
    if prompt is None:
        return json_response(line(_said(is_chat, ""), done=True, done_reason="load"))
    answer = simulator.answer(model, lease, prompt, body.get("options"))
    spoken = answer.spoken
    context = {} if is_chat else {"context": token_ids(prompt.text, prompt.tokens + spoken.count)}
    end = {"done": True, "done_reason": spoken.reason, **context, **answer.durations()}
    if body.get("stream") is False:
        await simulator.whole(answer)
        return json_response(line(_said(is_chat, spoken.text, spoken.calls), **end))

    async def lines() -> AsyncGenerator[bytes, None]:
        async for piece in simulator.pieces(answer):
            yield gojson.encode(line(_said(is_chat, piece))) + b"\n"
        if spoken.calls:
            yield gojson.encode(line(_said(is_chat, "", spoken.calls))) + b"\n"
        yield gojson.encode(line(_said(is_chat, ""), **end)) + b"\n"

    return Response(content_type=NDJSON, body=lines())
