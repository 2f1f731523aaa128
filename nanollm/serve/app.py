"""`chat.py --serve`: an OpenAI-compatible server for checkpoints, and one page to chat, compare and look inside.

    GET  /                       the page (page.html)
    GET  /v1/models              the checkpoints
    POST /v1/chat/completions    an answer, whole or as a stream of server-sent events
    POST /api/see                tokens, probabilities and one head's attention of a conversation or a text

It is made for one's own machine. It listens on 127.0.0.1, and since any web page that one visits can send requests there too, a request
from another origin or under a foreign name (DNS rebinding) is refused. What a client sends has a bound
in size and in time, and so has the work that is done for it.
"""
import asyncio
import contextlib
import ipaddress
import json
import secrets
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm.config import UserError
from nanollm.generate import StopStrings, steps
from nanollm.serve.engine import END, Engine
from nanollm.serve.request import ApiError, number, read_ask, read_json, read_messages, short
from nanollm.serve.see import entry, look
from nanollm.tokenizer import StreamDecoder, render

CONNECTIONS, HEAD_SECONDS, BODY_SECONDS, SEND_SECONDS, DISCARD, SEE_TOKENS = 300, 10, 20, 60, 64 * 2**20, 512
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")           # the page loads nothing from anywhere


@dataclass
class Served:
    """A model under its name. completion: it is only pretrained, and goes on with the text instead of answering."""
    id: str
    model: torch.nn.Module
    tok: object
    meta: dict
    completion: bool

    def ids(self, messages, answering=True):
        """What the model reads: up to where its answer begins, or (answering=False) to the end of the answer in the last message."""
        tok = self.tok
        if self.completion:                                  # a document begins after <|endoftext|>; earlier exchanges are other documents
            return [tok.eos_id] + [i for m in messages[-1 if answering else -2:] for i in tok.encode(m["content"])]
        ids = render(tok, messages, add_generation_prompt=answering)[0]
        return ids if answering else ids[: len(ids) - ids[::-1].index(tok.end_id)]

    def card(self, created, most):
        args = self.model.args
        return {"id": self.id, "object": "model", "created": created, "owned_by": "nanollm", "stage": self.meta["stage"], "step": self.meta["step"],
                "completion": self.completion, "context": args.max_seq_len, "layers": args.n_layers, "heads": args.n_heads,
                "longest_answer": most}


def answer(served, ids, ask):
    """The engine's work: yields (text, elements of logprobs.content) for each token, at last (finish_reason, tokens written)."""
    model, tok = served.model, served.tok
    generator = torch.Generator(next(model.parameters()).device).manual_seed(ask.seed)
    limit = ask.max_tokens if model.cache(model).endless else min(ask.max_tokens, model.args.max_seq_len - len(ids))
    decoder, stops, held, n = StreamDecoder(tok), StopStrings(ask.stop), [], 0
    for step in steps(model, ids, ask.max_tokens, stop_ids=tok.stop_ids, generator=generator, top=ask.top, **ask.sampling):
        n += 1
        held += [entry(tok, step.token, step.logprob, step.top)] if ask.logprobs else []
        text = stops.feed(decoder.feed(step.token))
        yield (text, held) if text else ("", [])             # tokens appear with their text: a character, or a stop string, may span several
        held = [] if text else held
        if stops.done:
            break
    else:
        text = stops.feed(decoder.flush()) + stops.flush()
        if text or held:
            yield text, held
    yield "stop" if stops.done or n < limit else "length", n


def foreign(headers, names):
    """Why a request's headers ({name: value}, lower case) are not those of somebody at this server's own address; "" if they are.

    An address in numbers cannot be rebound to another machine by a name server; of names only our own count."""
    host, origin = headers.get("host", ""), headers.get("origin")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host               # without the port; [::1] has colons of its own
    try:
        numeric = bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        numeric = False
    if not numeric and name.lower() not in names:
        return f"the Host header {host[:60]!r} is none of this server's names"
    if origin is not None and origin.partition("://")[2] != host:
        return f"a page from {origin[:60]!r} may not use this server"
    return ""


def reply(value, status=200, headers=None):
    from fastapi.responses import Response
    headers = {**(headers or {}), **({"Retry-After": "1"} if status in (429, 503) else {})}
    return Response(json.dumps(value), status, headers, "application/json")              # ASCII: no half of a surrogate pair gets lost


def make_app(models, engine, defaults, most, max_bytes, names=("localhost",)):
    """The FastAPI app. models: [Served]; defaults: options of generate.sample where a request names none; most: tokens of the longest
    answer; max_bytes of a request's body; names: host names by which the server may be called."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    app, created = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), int(time.time())
    by_id = {served.id: served for served in models}

    @app.exception_handler(ApiError)
    async def api_error(request, e):
        return reply(e.body, e.status)

    @app.exception_handler(HTTPException)
    async def http_error(request, e):
        return reply(ApiError(e.status_code, f"{request.method} {request.url.path[:80]}: {e.detail}").body, e.status_code, e.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request, e):                              # before its request was whole
        return Response(status_code=499)

    @app.exception_handler(Exception)                        # a mistake of ours: starlette prints the traceback
    async def our_error(request, e):
        return reply(ApiError(500, "the server failed at this request; its console says why").body, 500)

    class Guard:
        """Before anything else, and without reading the body."""

        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            reason = scope["type"] == "http" and foreign({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}, names)
            await (reply(ApiError(403, reason).body, 403) if reason else self.app)(scope, receive, send)

    app.add_middleware(Guard)

    async def body_of(request):
        """The JSON of a request. One that is too long is read to its end and forgotten, else the client would only see a broken connection."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the request's body as Content-Type: application/json")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= max_bytes:
                        body += chunk
                    if size > DISCARD:
                        break
        except TimeoutError:
            raise ApiError(408, f"the request's body did not arrive within {BODY_SECONDS} seconds") from None
        if size > max_bytes:
            raise ApiError(413, f"the request's body is longer than {max_bytes} bytes (--max_request_bytes)")
        return read_json(bytes(body))

    def find(name):
        if not isinstance(name, str) or name and name not in by_id:
            raise ApiError(404, f"the model {short(name)} is not served here; there are: {', '.join(by_id)}", "model", "model_not_found")
        return by_id[name] if name else models[0]

    async def events(job, request):
        """What the engine makes of a job, until it is done, fails, or the client has hung up."""
        looked = time.monotonic()
        try:
            while True:
                try:
                    event = await asyncio.wait_for(job.events.get(), 0.25)
                except TimeoutError:
                    event = None
                if time.monotonic() - looked > 0.25:
                    if await request.is_disconnected():
                        return
                    looked = time.monotonic()
                if isinstance(event, ApiError):
                    raise event
                if event is END:
                    return
                if event is not None:
                    yield event
        finally:
            engine.cancel(job)

    @app.get("/")
    async def page():
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"),
                            headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    @app.get("/v1/models")
    async def list_models():
        return reply({"object": "list", "data": [served.card(created, most) for served in models]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name):
        return reply(find(name).card(created, most))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        body = await body_of(request)
        served, ask = find(body.get("model", "")), read_ask(body, defaults, most)
        ids = await asyncio.to_thread(served.ids, ask.messages)              # a long text must not hold up the others' streams
        room = served.model.args.max_seq_len
        if len(ids) >= room:
            raise ApiError(400, f"the messages are {len(ids)} tokens and the context of {served.id} is {room}, answer included; leave out the oldest "
                           "exchanges", "messages", "context_length_exceeded")
        made = events(engine.submit(answer(served, ids, ask)), request)
        head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time()), "model": served.id}

        def choice(text_key, value, entries, reason):
            return [{"index": 0, text_key: value, "logprobs": {"content": entries, "refusal": None} if ask.logprobs else None, "finish_reason": reason}]

        def usage(n):
            return {"prompt_tokens": len(ids), "completion_tokens": n, "total_tokens": len(ids) + n}

        def event(choices, **more):
            return "data: " + json.dumps({**head, "object": "chat.completion.chunk", "choices": choices, **more}) + "\n\n"

        async def stream(first):
            """Server-sent events. Errors from here on come as an event: the status 200 is already sent."""
            yield event(choice("delta", {"role": "assistant", "content": ""}, [], None))
            try:
                async with contextlib.aclosing(made):
                    part = first
                    while part is not None:
                        text, entries = part
                        if isinstance(entries, int):                         # the last: (finish_reason, tokens)
                            yield event(choice("delta", {}, [], text))
                            if ask.include_usage:
                                yield event([], usage=usage(entries))
                            yield "data: [DONE]\n\n"
                        elif text or entries:
                            yield event(choice("delta", {"content": text}, entries, None))
                        part = await anext(made, None)
            except ApiError as e:
                yield "data: " + json.dumps(e.body) + "\n\n"

        if ask.stream:
            first = await anext(made, None)                  # an error before the first token still has a status of its own
            return StreamingResponse(stream(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with contextlib.aclosing(made):
            parts = [part async for part in made]
        if not parts or not isinstance(parts[-1][1], int):
            return Response(status_code=499)                 # nobody reads it: the client has hung up
        reason, n = parts.pop()
        message = {"role": "assistant", "content": "".join(text for text, _ in parts), "refusal": None}
        return reply({**head, "object": "chat.completion", "choices": choice("message", message, [e for _, es in parts for e in es], reason),
                      "usage": usage(n)})

    @app.post("/api/see")
    async def see(request: Request):
        """{model, messages | text, layer, head} -> {tokens: [an element of logprobs.content, logprob null for the first], attention}."""
        body = await body_of(request)
        if unknown := sorted(body.keys() - {"model", "messages", "text", "layer", "head"}):
            raise ApiError(400, f"unknown parameter {short(unknown[0])}", unknown[0][:60])
        served = find(body.get("model", ""))
        args = served.model.args
        layer, head = number(body, "layer", 0, 0, args.n_layers - 1, int), number(body, "head", 0, 0, args.n_heads - 1, int)
        if "text" in body:
            if not isinstance(body["text"], str) or "messages" in body:
                raise ApiError(400, "give either messages or a text, a string", "text")
            ids = [served.tok.eos_id] + await asyncio.to_thread(served.tok.encode, body["text"])
        else:
            messages = body.get("messages")
            answered = isinstance(messages, list) and messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
            messages = read_messages(messages[:-1] if answered else messages) + (messages[-1:] if answered else [])
            if answered and not isinstance(messages[-1].get("content"), str):
                raise ApiError(400, "the answer's content must be text", "messages")
            ids = await asyncio.to_thread(served.ids, messages, not answered)
        if len(ids) > min(args.max_seq_len, SEE_TOKENS):
            raise ApiError(400, f"{len(ids)} tokens are too many to look at; at most {min(args.max_seq_len, SEE_TOKENS)}", code="context_length_exceeded")

        def work():
            steps, attention = look(served.model, ids, layer, head)
            tokens = [entry(served.tok, i, logprob, top) for i, (logprob, top) in zip(ids, [(None, []), *steps])]
            yield {"model": served.id, "layer": layer, "head": head, "tokens": tokens,
                   "attention": [[round(p, 4) for p in row[: t + 1]] for t, row in enumerate(attention.tolist())]}

        async with contextlib.aclosing(events(engine.submit(work()), request)) as made:
            return reply(await anext(made, {}))

    return app


def named_models(loaded):
    """[Served] from [(path, model, tokenizer, meta)]: out/demo/dpo is called dpo; two of the same name keep their whole paths."""
    short = [Path(path).resolve().name for path, *_ in loaded]
    return [Served(path if short.count(name) > 1 else name, model, tok, meta, meta["stage"] == "pretrain")
            for name, (path, model, tok, meta) in zip(short, loaded)]


def server_config(app):
    """uvicorn's settings, and three bounds that it lacks: its timeout between two requests ends with the first byte and a new connection has
    none; it waits for ever for a client to read; and beyond its limit of connections it answers in plain text, where clients expect JSON."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    async def full(scope, receive, send):
        await reply(ApiError(503, f"{CONNECTIONS} connections are open; try again in a moment").body, 503)(scope, receive, send)

    class Protocol(H11Protocol):
        """A connection. It closes when its next request has no whole head after HEAD_SECONDS, or when what it has been sent is not read within
        SEND_SECONDS. Its first byte takes one of CONNECTIONS places, which it keeps; without a place it gets 503."""
        placed = sending = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self.timeout_keep_alive_task = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)
            transport.set_write_buffer_limits(0)             # so that pause_writing means: the network takes no more, a client does not read
            if len(self.connections) > 2 * CONNECTIONS:      # a process has only so many files
                transport.abort()

        def data_received(self, data):
            timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None     # else cancelled by these bytes
            self.placed = self.placed or sum(bool(other.placed) for other in self.connections) < CONNECTIONS
            self.app = self.config.loaded_app if self.placed else full
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self.timeout_keep_alive_task = timer
            elif timer is not None:
                timer.cancel()

        def pause_writing(self):
            super().pause_writing()
            self.sending = self.loop.call_later(SEND_SECONDS, self.transport.abort)      # not close(), which would wait for the reader

        def resume_writing(self):                            # all is sent
            super().resume_writing()
            self.sending.cancel()

        def connection_lost(self, exc):
            super().connection_lost(exc)
            if self.sending:
                self.sending.cancel()

        def shutdown(self):
            super().shutdown()
            self.loop.call_later(3, self.transport.abort)    # who then still sends or does not read is left

    return uvicorn.Config(app, http=Protocol, ws="none", log_level="warning", backlog=CONNECTIONS, timeout_graceful_shutdown=5,
                          timeout_keep_alive=HEAD_SECONDS, h11_max_incomplete_event_size=65536)


def serve(loaded, cfg, defaults):
    """Serve [(path, model, tokenizer, meta)] until Ctrl-C or SIGTERM. cfg: chat.py's."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError("--serve needs FastAPI and uvicorn: pip install -e '.[web]'") from None
    try:
        sock = socket.create_server((cfg.host, cfg.port), family=socket.AF_INET6 if ":" in cfg.host else socket.AF_INET)
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {cfg.host} --port {cfg.port}: {e}; choose another --port (0 = any that is free) or --host") from None
    models, engine = named_models(loaded), Engine(cfg.together, cfg.queue)
    machine, port, beyond = socket.gethostname().lower(), sock.getsockname()[1], cfg.host not in ("127.0.0.1", "::1", "localhost")
    names = {"localhost", machine, cfg.host.lower(), *([f"{machine}.local"] if beyond else [])}
    app = make_app(models, engine, defaults, cfg.max_new_tokens, cfg.max_request_bytes, names)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):                   # end the answers in the making, then as uvicorn does
            engine.stop()
            super().handle_exit(sig, frame)

    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupt)                 # uvicorn raises the signal again when all is closed
    address = f"http://{f'[{cfg.host}]' if ':' in cfg.host else cfg.host}:{port}"
    try:
        print(f"serving {', '.join(served.id for served in models)} at {address} (the page) and {address}/v1 (OpenAI's API); Ctrl-C ends", flush=True)
        if beyond:
            print(f"warning: not only this machine can reach it, and there is no password; from others: http://{machine}:{port}, http://{machine}.local:{port} "
                  "or the address in numbers", flush=True)
        Server(server_config(app)).run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    finally:
        engine.stop()
        engine.thread.join(5)
    print("\nstopped", flush=True)
