"""chat.py --serve: OpenAI's API, driven by OpenAI's own client; its limits, its errors, and how it ends."""
import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import httpx
import pytest
import torch
import uvicorn
from conftest import ROOT, tiny_lm, tiny_tokenizer

import chat
from nanollm import checkpoint, variants
from nanollm.config import UserError
from nanollm.generate import steps
from nanollm.model import ModelArgs
from nanollm.peft import add_adapter
from nanollm.serve import app as serving
from nanollm.serve.engine import Engine
from nanollm.serve.see import look
from nanollm.tokenizer import render

DEFAULTS = {name: getattr(chat.Config(), name) for name in chat.SAMPLING}
HI = [{"role": "user", "content": "What has 小明?"}]


@contextlib.contextmanager
def running(models, together=4, queue=32, most=40, max_bytes=200_000):
    """A server on a free port, in a thread -> (address, engine)."""
    engine = Engine(together, queue)
    app = serving.make_app(models, engine, DEFAULTS, most, max_bytes)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)              # so that the kernel does not do the waiting for a slow reader
    server = uvicorn.Server(serving.server_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", engine
    finally:
        engine.stop()
        server.should_exit = True
        thread.join(20)
        engine.thread.join(5)
        assert not thread.is_alive() and not engine.thread.is_alive()


@pytest.fixture(scope="module")
def models():
    tok = tiny_tokenizer()
    return serving.named_models([("out/sft", tiny_lm(0, max_seq_len=128), tok, {"stage": "sft", "step": 3}),
                                 ("out/dpo", tiny_lm(1, max_seq_len=128), tok, {"stage": "dpo", "step": 4}),
                                 ("out/pretrain", tiny_lm(2, max_seq_len=128), tok, {"stage": "pretrain", "step": 5})])


@pytest.fixture(scope="module")
def server(models):
    with running(models) as (address, engine):
        yield address


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server + "/v1", api_key="none", max_retries=0)


def greedy(served, messages, n, **sampling):
    """What the model itself writes: [Step]."""
    return list(steps(served.model, served.ids(messages), n, stop_ids=served.tok.stop_ids, top=3, **DEFAULTS | {"temperature": 0.0} | sampling))


# ---- the API ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_by_name(client, models):
    """out/sft is called sft; two runs of one name keep their paths."""
    assert [m.id for m in client.models.list()] == ["sft", "dpo", "pretrain"] and client.models.retrieve("dpo").id == "dpo"
    loaded = [(path, None, None, {"stage": "sft"}) for path in ("a/sft", "b/sft", "b/dpo/")]
    assert [m.id for m in serving.named_models(loaded)] == ["a/sft", "b/sft", "dpo"]
    with pytest.raises(openai.NotFoundError, match="sft, dpo, pretrain"):
        client.chat.completions.create(model="gpt-4", messages=HI)


def test_an_answer_is_what_the_model_writes_with_its_probabilities(client, models):
    """Text, log-probabilities, alternatives and usage equal our own loop's, plain and streamed, for both checkpoints and for one that
    has only been pretrained, which goes on with the text."""
    for served in models:
        want = greedy(served, HI, 12)
        plain = client.chat.completions.create(model=served.id, messages=HI, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3)
        text, tok = served.tok.decode([s.token for s in want]), served.tok
        assert plain.choices[0].message.content == text and plain.model == served.id
        assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (len(served.ids(HI)), len(want))
        assert plain.choices[0].finish_reason == ("length" if len(want) == 12 else "stop")
        for got, step in zip(plain.choices[0].logprobs.content, want, strict=True):
            assert bytes(got.bytes or []) == tok.token_bytes(step.token) and abs(got.logprob - step.logprob) < 1e-4
            assert [round(math.exp(t.logprob), 4) for t in got.top_logprobs] == [round(p, 4) for _, p in step.top]
        chunks = list(client.chat.completions.create(model=served.id, messages=HI, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=3,
                                                     stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert [e for c in chunks if c.choices for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])] == plain.choices[0].logprobs.content
        assert chunks[-1].usage == plain.usage and chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
        assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1


def test_a_seed_fixes_an_answer_and_sampling_options_count(client):
    """Temperature 1: the same seed twice, two seeds, no seed; a top_p of almost nothing is greedy."""
    def ask(**kw):
        return client.chat.completions.create(model="sft", messages=HI, max_tokens=20, **{"temperature": 1, "top_p": 1, **kw}).choices[0].message.content
    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert len({ask() for _ in range(3)}) > 1
    assert ask(top_p=1e-6, seed=7) == ask(temperature=0)


def test_a_stop_string_ends_the_answer_and_does_not_show(client, models):
    """Also across tokens, plain and streamed; the tokens of the stop string are in no list."""
    text = models[0].tok.decode([s.token for s in greedy(models[0], HI, 12)])
    stop = text[3:6]
    for stream in (False, True):
        got = client.chat.completions.create(model="sft", messages=HI, max_tokens=12, temperature=0, stop=stop, stream=stream, logprobs=True)
        choices = [c.choices[0] for c in got if c.choices] if stream else got.choices
        said = "".join((c.delta if stream else c.message).content or "" for c in choices)
        assert said == text[: text.index(stop)] and choices[-1].finish_reason == "stop"


def test_the_history_counts(client):
    """A system prompt and earlier turns change the answer; content may be a list of text parts."""
    def ask(messages):
        return client.chat.completions.create(model="sft", messages=messages, max_tokens=20, temperature=1, seed=1).choices[0].message.content
    asked = [ask(HI), ask([{"role": "system", "content": "Be brief."}, *HI]), ask([{"role": "user", "content": "A"}, {"role": "assistant", "content": ""}, *HI])]
    assert len(set(asked)) == 3
    assert ask([{"role": "user", "content": [{"type": "text", "text": "What has "}, {"type": "text", "text": "小明?"}]}]) == asked[0]


# ---- what is refused ----------------------------------------------------------------------------------------------------

BAD = [({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
       ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
       ({"messages": [{"role": "\ud83d", "content": "x"}]}, "unknown role"),
       ({"messages": []}, "at least one message"), ({}, "at least one message"), ({"messages": "Hi"}, "must be a list"), ({"messages": [3]}, "an object"),
       ({"messages": [{"role": "user", "content": "  "}]}, "not empty"), ({"messages": [{"role": "user", "content": 5}]}, "must be text"),
       ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
       ({"messages": [*HI, *HI]}, "take turns"), ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "ending with the user"),
       ({"messages": [*HI, {"role": "system", "content": "x"}]}, "take turns"), ({"messages": [{"role": "user", "content": "x", "name": "Ben"}]}, "'name' is not supported"),
       ({"messages": HI, "n": 2}, "n 2 is not supported"), ({"messages": HI, "tools": [1]}, "tools"), ({"messages": HI, "frequency_penalty": 0.5}, "frequency_penalty"),
       ({"messages": HI, "temprature": 1}, "unknown parameter 'temprature'"), ({"messages": HI, "temperature": 3}, "from 0 to 2"),
       ({"messages": HI, "temperature": "hot"}, "from 0 to 2"), ({"messages": HI, "temperature": True}, "from 0 to 2"), ({"messages": HI, "top_p": -1}, "top_p"),
       ({"messages": HI, "max_tokens": 0}, "max_tokens must be an integer from 1 to"),
       ({"messages": HI, "tool_choice": "required"}, "tool_choice"), ({"messages": HI, "modalities": ["audio"]}, "modalities"),
       ({"messages": HI, "max_tokens": 2.5}, "an integer"), ({"messages": HI, "seed": 10**30}, "seed"),
       *[({"messages": HI, name: 10**400}, name) for name in ("seed", "max_tokens", "temperature", "top_k")], ({"messages": HI, "stream": 1}, "true or false"),
       ({"messages": HI, "stop": ["a"] * 5}, "at most 4"), ({"messages": HI, "stop": [""]}, "stop"), ({"messages": HI, "top_logprobs": 3}, "goes with"),
       ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "from 0 to 20"), ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
       ({"messages": [{"role": "user", "content": "word " * 200}]}, "the context of sft is 128"),
       *[({"messages": HI, "logprobs": True, name: value}, name) for name in ("n", "max_tokens", "max_completion_tokens", "seed", "top_k", "top_logprobs")
         for value in (True, False, 1.0, 1.5, "1", [1], {})],
       *[({"messages": HI, name: value}, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
         for value in (True, False, "0", [0], {})],
       ({"messages": HI, "max_tokens": "9", "max_completion_tokens": 9}, "max_tokens"), ({"messages": HI, "store": 0}, "store"),
       ({"messages": HI, "logit_bias": []}, "logit_bias")]


def test_what_clients_send_by_habit_is_no_error(server, client):
    """Words at the value that changes nothing, labels and hints are read over; a developer's message is the system's; more tokens than the
    server gives are as many as it gives."""
    def ask(**body):
        response = httpx.post(server + "/v1/chat/completions", content=json.dumps({"messages": HI, "seed": 3, **body}), headers={"Content-Type": "Application/JSON; charset=utf-8"})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]
    plain = ask(max_tokens=40)
    assert ask(max_tokens=4096, tools=[], tool_choice="auto", parallel_tool_calls=True, service_tier="auto", reasoning_effort="low", verbosity="low", modalities=["text"],
               safety_identifier="x", top_logprobs=0, logprobs=False, n=1, presence_penalty=0.0, frequency_penalty=0, temperature=None) == plain
    assert ask(max_tokens=4096, repetition_penalty=1, stop=None, logprobs=True)["finish_reason"] in ("length", "stop")
    assert len(ask(max_tokens=4096, logprobs=True)["logprobs"]["content"]) <= 40
    developer, system = ([{"role": role, "content": "Be brief."}, *HI] for role in ("developer", "system"))
    assert ask(messages=developer) == ask(messages=system) != plain


@pytest.mark.parametrize("body, words", BAD, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_a_bad_request_gets_one_sentence(server, body, words):
    """Status 400 and OpenAI's error object, whatever is wrong."""
    response = httpx.post(server + "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and words in error["message"] and error["type"] == "invalid_request_error" and {"param", "code"} <= error.keys()


def test_what_is_no_request_at_all_is_refused(server):
    """Bodies that are no JSON object, other types, other paths and methods: each its status, always the error object."""
    def post(content, type="application/json", path="/v1/chat/completions"):
        return httpx.post(server + path, content=content, headers={"content-type": type})
    bad = [post(b"{"), post(b"\xff"), post(b"[1]"), post(b'{"temperature": NaN}'), post(b"[" * 50_000), post(b'{"seed": ' + b"1" * 5000 + b"}"), post(b"")]
    assert [r.status_code for r in bad] == [400] * len(bad)
    others = [post(b"{}", "text/plain"), httpx.get(server + "/v1/nothing"), httpx.get(server + "/v1/chat/completions"), httpx.get(server + "/v1/models/x")]
    assert "nested too deeply" in bad[4].text and "sys." not in bad[5].text and others[2].headers["allow"] == "POST"
    assert [r.status_code for r in others] == [415, 404, 405, 404] and all(r.json()["error"]["message"] for r in bad + others)


def test_ten_megabytes_are_refused_and_the_server_goes_on(server):
    """413 with the limit in its sentence, whether the length is announced or not; a lone surrogate in a text is no crash either."""
    big = json.dumps({"messages": [{"role": "user", "content": "我" * 3_500_000}]}, ensure_ascii=False).encode()
    assert len(big) > 10_000_000
    for content in (big, (big[i : i + 65536] for i in range(0, len(big), 65536))):
        response = httpx.post(server + "/v1/chat/completions", content=content, headers={"content-type": "application/json"}, timeout=60)
        assert response.status_code == 413 and "200000 bytes" in response.json()["error"]["message"]
    odd = httpx.post(server + "/v1/chat/completions", content=b'{"messages": [{"role": "user", "content": "\\ud83d"}], "max_tokens": 2}', headers={"content-type": "application/json"})
    assert odd.status_code == 200


def test_a_page_from_elsewhere_cannot_drive_the_server(server, models):
    """A foreign Origin, a foreign Host (DNS rebinding) and a Host that is none are refused; our own page and local names are not."""
    host = server.removeprefix("http://")
    for headers, status in (({}, 200), ({"origin": server}, 200), ({"host": "localhost:1"}, 200), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
                            ({"host": "evil.example"}, 403), ({"host": "evil.example", "origin": "http://evil.example"}, 403), ({"host": "["}, 403),
                            ({"host": f"localhost.evil.example:{host.split(':')[1]}"}, 403), ({"origin": "http://127.0.0.1:1"}, 403)):
        assert httpx.get(server + "/v1/models", headers=headers).status_code == status, headers
    with socket.create_connection(("127.0.0.1", int(host.split(":")[1]))) as s:
        s.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b" 403 " in s.recv(200)


# ---- many clients, and clients that leave ---------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """Each token takes 10 ms, so that things happen meanwhile; -> the list of tokens made."""
    made = []

    def late(*args, **kwargs):
        for step in steps(*args, **kwargs | {"stop_ids": ()}):
            time.sleep(0.01)
            made.append(step.token)
            yield step
    monkeypatch.setattr(serving, "steps", late)
    return made


def until(condition, seconds=10):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_answer(models, slow, stream, capfd):
    """In the middle of a stream, in the middle of a plain request, while it waits in the queue, and in the middle of its own words; none of
    it is worth a traceback."""
    with running(models, together=1, queue=2, most=100) as (address, engine):
        body = {"messages": HI, "max_tokens": 100, "stream": stream}
        for waits in (False, True):
            del slow[:]
            sockets = [socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))) for _ in range(1 + waits)]
            for s in sockets:
                content = json.dumps(body).encode()
                s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            until(lambda: len(slow) > 3 and len(engine.waiting) == waits)
            for s in reversed(sockets):
                s.close()
                until(lambda: s is sockets[0] or not engine.waiting)
            until(lambda: not engine.active)
            assert len(slow) < 100
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        assert httpx.get(address + "/v1/models").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_two_hundred_clients_at_once_each_get_an_answer_or_a_clear_no(models):
    """With 8 places: every request ends, in 200 with the whole answer or in 429 with Retry-After; never are more than 8 held."""
    with running(models, together=2, queue=6) as (address, engine):
        most, submit = [], engine.submit

        def watched(work):
            job = submit(work)
            most.append(len(engine.waiting) + len(engine.active))
            return job
        engine.submit = watched

        async def crowd():
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=200)) as http:
                return await asyncio.gather(*[http.post(address + "/v1/chat/completions", json={"messages": HI, "max_tokens": 8, "temperature": 0}) for _ in range(200)])
        responses = asyncio.run(crowd())
        codes = [r.status_code for r in responses]
        good = [r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200]
        assert set(codes) == {200, 429} and len(good) >= 8 and len(set(good)) == 1 and max(most) <= 8
        assert all("6 requests wait" in r.json()["error"]["message"] and r.headers["retry-after"] for r in responses if r.status_code == 429)
        until(lambda: not engine.active and not engine.waiting)
        assert httpx.get(address + "/v1/models").status_code == 200


def test_idle_connections_and_slow_bodies_have_bounds(models, monkeypatch):
    """A request while all places are taken gets 503 as JSON, whatever it sends; a connection with a place keeps it, one that is given back serves
    again; half a body is waited for in vain only so long; twice as many connections as places are all there can be."""
    monkeypatch.setattr(serving, "CONNECTIONS", 10)
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.3)
    with running(models) as (address, engine), httpx.Client(base_url=address) as late:
        port = int(address.rsplit(":")[-1])
        idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(10)]
        for s in idle:
            s.sendall(b"POST /api/see HTTP/1.1\r\n")
        until(lambda: late.get("/v1/models").status_code == 503)
        refused = late.post("/v1/chat/completions", content=b"x" * 1_000_000)
        assert refused.status_code == 503 and refused.headers["retry-after"] and "10 connections" in refused.json()["error"]["message"]
        idle[0].sendall(b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        assert b" 408 " in idle[0].recv(300)
        for s in idle[1:]:
            s.close()
        until(lambda: late.get("/v1/models").status_code == 200)
        idle[0].close()
        crowd = [socket.create_connection(("127.0.0.1", port), timeout=3) for _ in range(22)]
        assert crowd[-1].recv(1) == b""                      # closed at once
        for s in crowd:
            s.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_left_after_a_while(models, monkeypatch, stream):
    """After SEND_SECONDS its place is another's and no more is generated for it. One that reads a stream more slowly than it comes gets all
    of it."""
    monkeypatch.setattr(serving, "CONNECTIONS", 1)
    made, entry = [], serving.entry

    def large(*args, **kwargs):                              # tokens of 100 kB each: more than the kernel buffers
        for step in list(steps(*args, **kwargs | {"stop_ids": ()}))[:1] * n:
            time.sleep(0.01)
            made.append(step)
            yield step
    monkeypatch.setattr(serving, "steps", large)
    monkeypatch.setattr(serving, "entry", lambda *args: {**entry(*args), "padding": "x" * 100_000})
    body = json.dumps({"messages": HI, "logprobs": True, "stream": stream}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with running(models, together=1, queue=0) as (address, engine):
        for reads in (False, True):
            del made[:]
            monkeypatch.setattr(serving, "SEND_SECONDS", 60 if reads else 2)
            n = 600 if stream and not reads else 30
            with socket.socket() as s:
                s.settimeout(10)
                if not reads:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                s.connect(("127.0.0.1", int(address.rsplit(":")[-1])))
                s.sendall(head % len(body) + body)
                until(lambda: made)
                assert httpx.get(address + "/v1/models").status_code == 503
                got = b""
                while reads and (more := s.recv(2**18)):
                    got += more
                    time.sleep(0.02 if stream else 0)
                until(lambda: httpx.get(address + "/v1/models").status_code == 200)
                until(lambda: not engine.active)
                assert (len(got) > 3_000_000 and got.rstrip(b"\r\n0").endswith(b"[DONE]" if stream else b"}")) == reads
                assert len(made) < n if stream and not reads else len(made) == n


def test_a_connection_that_never_asks_is_closed(models, monkeypatch):
    """Silent, with half a head, with a head that comes by the byte, and with half a second head behind an answer; an answer has its time."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    with running(models) as (address, engine):
        head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
        for sent in (b"", head, head + b"\r\n", head + b"\r\n" + head):
            with socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1])), timeout=10) as s:
                s.sendall(sent)
                got = b"".join(iter(lambda: s.recv(65536), b""))             # ends when the server closes
                assert (b" 200 " in got) == (b"\r\n\r\n" in sent)
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1])), timeout=10) as s, pytest.raises(OSError):
            for byte in head * 99:
                s.sendall(bytes([byte]))
                time.sleep(0.02)


def test_an_answer_may_take_longer_than_a_head(models, slow, monkeypatch):
    """The bound on a request's head does not cut an answer that is being made."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.1)
    with running(models, most=40) as (address, engine):
        assert httpx.post(address + "/v1/chat/completions", json={"messages": HI}).json()["usage"]["completion_tokens"] == len(slow) == 40


def test_a_short_answer_does_not_wait_for_a_long_one(models, slow):
    """Answers take turns by the token, and taking turns changes none of them."""
    with running(models, together=2, most=100) as (address, engine):
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        ask = dict(messages=HI, temperature=1, seed=3)
        alone = client.chat.completions.create(model="sft", max_tokens=60, **ask).choices[0].message.content
        long = client.chat.completions.create(model="sft", max_tokens=60, stream=True, **ask)
        said = [next(long)]
        client.chat.completions.create(model="dpo", max_tokens=3, **ask)
        assert engine.active, "the long one is still being written"
        assert "".join(c.choices[0].delta.content or "" for c in [*said, *long]) == alone


def test_a_mistake_of_ours_fails_one_request_and_not_the_server(models, monkeypatch, capfd):
    """500 with a sentence before the first token, an error event after it (which OpenAI's client raises); the next request works."""
    with running(models) as (address, engine):
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        for good in (0, 3):
            def broken(*args, **kwargs):
                yield from list(steps(*args, **kwargs))[:good]
                raise RuntimeError("out of memory")
            monkeypatch.setattr(serving, "steps", broken)
            with pytest.raises(openai.InternalServerError if not good else openai.APIError, match="its console says why"):
                list(client.chat.completions.create(model="sft", messages=HI, stream=True, max_tokens=9))
        monkeypatch.setattr(serving, "steps", steps)
        assert client.chat.completions.create(model="sft", messages=HI, max_tokens=2).usage.total_tokens
        assert "out of memory" in capfd.readouterr().err


# ---- looking inside ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["qk_norm"], ["gpt2"], ["sliding_window:window=5,sinks=2"], ["rope_scaling:kind=yarn,factor=2"]], ids=str)
def test_the_attention_that_is_shown_is_the_one_that_was_used(words):
    """Rows sum to 1, nothing looks ahead, and probabilities times values, through wo, is what the layer puts out, with grouped heads too."""
    torch.manual_seed(0)
    model = variants.build(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=4 if words == ["gpt2"] else 2, vocab_size=64, max_seq_len=32, variants=words), "lm").eval()
    ids, caught = torch.randint(64, (20,)).tolist(), []
    for layer in (0, 1):
        attention = model.layers[layer].attention
        hook = attention.register_forward_hook(lambda module, inputs, out: caught.append((inputs[0], out)))
        heads = [look(model, ids, layer, h)[1] for h in range(4)]
        hook.remove()
        x, out = caught[-1]
        v = attention.qkv(x)[2][0].repeat_interleave(4 // attention.n_kv_heads, 0)
        mixed = torch.stack([a @ v[h] for h, a in enumerate(heads)], 1).reshape(1, 20, -1)
        assert torch.allclose(attention.wo(mixed), out, atol=1e-5)
        assert all(torch.allclose(a.sum(-1), torch.ones(20)) and not a.triu(1).any() for a in heads)


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix", "ptuning_v2"])
def test_the_attention_behind_virtual_tokens_is_that_among_the_tokens(method):
    """With n trained tokens in front, what is shown is T x T, looks at nothing ahead, and a row sums to 1 less what the virtual tokens get."""
    model = tiny_lm(max_seq_len=64)
    add_adapter(model, method, n=5)
    ids = torch.randint(64, (17,), generator=torch.Generator().manual_seed(0)).tolist()
    for layer in (0, 1):
        attention = look(model, ids, layer, 1)[1]
        assert attention.shape == (17, 17) and not attention.triu(1).any()
        assert (attention.sum(-1) > 0).all() and (attention.sum(-1) < 1).all()
        likely, attention = look(model, ids[:1], layer, 1)   # a text of one token
        assert likely == [] and 0 < attention.item() < 1


def test_see_gives_each_token_its_probability(server, models):
    """The log-probabilities of an answer equal those under which it was written; the text of all tokens is the text; a plain text and a
    pretrained model work too."""
    compared = 0
    for served in models:
        want = greedy(served, HI, 6)
        answer = served.tok.decode([s.token for s in want])
        if served.tok.encode(answer) != [s.token for s in want]:
            continue                                         # written in other pieces than read
        compared += 1
        seen = httpx.post(server + "/api/see", json={"model": served.id, "messages": [*HI, {"role": "assistant", "content": answer}], "layer": 1, "head": 3}).json()
        n = len(served.ids(HI))
        got = seen["tokens"][n : n + len(want)]
        assert torch.allclose(torch.tensor([t["logprob"] for t in got]), torch.tensor([s.logprob for s in want]), atol=1e-4)
        assert [len(row) for row in seen["attention"]] == list(range(1, len(seen["tokens"]) + 1)) and seen["tokens"][0]["logprob"] is None
    assert compared
    text = httpx.post(server + "/api/see", json={"model": "pretrain", "text": "Anna has a 苹果."}).json()["tokens"]
    assert b"".join(bytes(t["bytes"] or []) for t in text).decode() == "Anna has a 苹果." and text[0]["token"] == "<|endoftext|>"
    for body in ({"layer": 2}, {"head": -1}, {"head": 10**400}, *[{name: v} for name in ("layer", "head") for v in (True, False, 1.0, "1", [])], {"heads": 1}, {"text": 5}, {"text": "x", "messages": HI}, {"text": "x " * 400}, {"messages": [{"role": "assistant", "content": "x"}]}, {"messages": [*HI, {"role": "assistant"}]}, {}):
        response = httpx.post(server + "/api/see", json=body if "text" in body or "messages" in body or not body else {"text": "x", **body})
        assert response.status_code == 400 and response.json()["error"]["message"], body


def test_the_page_is_one_file_that_loads_nothing(server):
    """No address but our own in it, and a policy that forbids the rest."""
    page = httpx.get(server + "/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href|url|import)\s*[=(]?\s*["'(]?(?:https?:)?//""", page.text) and "innerHTML" not in page.text


# ---- the program ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(folder, *words):
    """chat.py --serve on two checkpoints, a and b -> (process, address)."""
    for name in ("a", "b"):
        checkpoint.save(folder / name, 1, tiny_lm(max_seq_len=4096), tiny_tokenizer(), "sft", None)
    process = subprocess.Popen([sys.executable, "chat.py", "--serve", "--port", "0", "--init_from", str(folder / "a"), str(folder / "b"), "--device", "cpu", *words],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process, re.search(r"http://\S+:\d+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda s: s.name)
def test_ctrl_c_ends_the_server_at_once_and_in_order(tmp_path, sign):
    """chat.py --serve with two checkpoints answers; a signal in the middle of a stream ends the stream and the program, with code 0 and no
    traceback; so it does with half a head and half a body on other connections, which are left after three seconds (SIGTERM)."""
    with program(tmp_path, "--max_new_tokens", "3000") as (process, address):
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == ["a", "b"]
        stream = client.chat.completions.create(model="b", messages=HI, stream=True, temperature=0, extra_body={"repetition_penalty": 1})
        next(stream)
        half = [socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))) for _ in range(2 * (sign == signal.SIGTERM))]
        for s, more in zip(half, (b"", b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")):
            s.sendall(b"POST /api/see HTTP/1.1\r\nHost: localhost\r\n" + more)
        time.sleep(0.2)
        process.send_signal(sign)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert process.wait(15) == 0
        assert process.stdout.read().strip() == "stopped"
        for s in half:
            s.close()


@pytest.mark.slow
def test_memory_is_bounded_whatever_two_hundred_clients_send(tmp_path):
    """200 at once with 245 kB each (accepted and far too long for the context), 50 with 10 MB, 200 with a short question: each gets its
    status, and the server's peak grows by less than 250 MB."""
    def peak(process):
        with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) / 1024

    async def crowd(address, n, text, **more):
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=n)) as http:
            body = json.dumps({"messages": [{"role": "user", "content": text}], **more}).encode()
            sent = [http.post(address + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}) for _ in range(n)]
            return {r.status_code for r in await asyncio.gather(*sent)}

    with program(tmp_path, "--max_new_tokens", "64") as (process, address):
        asyncio.run(crowd(address, 1, "Hi"))
        before = peak(process)
        assert asyncio.run(crowd(address, 200, "word " * 49_000)) == {400}
        assert asyncio.run(crowd(address, 50, "word " * 2_000_000)) == {413}
        assert asyncio.run(crowd(address, 200, "Hi", max_tokens=64)) <= {200, 429}
        print(f"peak memory: {before:.0f} MB after one request, {peak(process):.0f} MB after 450 more")
        assert peak(process) - before < 250


def test_beyond_this_machine_the_server_goes_by_the_machines_name(monkeypatch, capsys):
    """With --host 0.0.0.0 the names of the machine are printed, and allowed; the one under .local only then."""
    allowed, make_app = [], serving.make_app
    monkeypatch.setattr(socket, "gethostname", lambda: "MyBox")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(serving, "make_app", lambda *args: allowed.append(args[-1]) or make_app(*args))
    for host in ("127.0.0.1", "0.0.0.0"):
        serving.serve([], chat.Config(host=host, port=0), DEFAULTS)
    refused = [[name for name in ("mybox:1", "mybox.local:1", "evil.example:1") if serving.foreign({"host": name}, names)] for names in allowed]
    assert refused == [["mybox.local:1", "evil.example:1"], ["evil.example:1"]]
    assert capsys.readouterr().out.count("http://mybox.local:") == 1


def test_a_port_in_use_and_a_missing_extra_are_said(models, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(UserError, match="choose another --port"):
        serving.serve([], chat.Config(port=sock.getsockname()[1]), DEFAULTS)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"\[web\]"):
        serving.serve([], chat.Config(), DEFAULTS)
