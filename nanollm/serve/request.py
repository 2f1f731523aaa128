"""What a client may ask for: the JSON of POST /v1/chat/completions, read and checked. No web framework in here.

The words are those of OpenAI's API, so that its clients work unchanged. Whatever cannot be done is refused in words: a client that
asks for tools and gets plain text has been misled.
"""
import json
import secrets
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant")
# understood, but only at values that change nothing, of this very type: true is no 1
FIXED = {"n": [1], "presence_penalty": [0, 0.0], "frequency_penalty": [0, 0.0], "logit_bias": [{}], "store": [False], "response_format": [{"type": "text"}],
         "modalities": [["text"]], "tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "service_tier": ["auto", "default"]}
NO_PART = {"user", "metadata", "safety_identifier", "prompt_cache_key",                  # labels of the caller's own
           "parallel_tool_calls", "reasoning_effort", "verbosity"}                       # hints about what no model here does
KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
         "repetition_penalty", "stop", "seed", "logprobs", "top_logprobs", *FIXED, *NO_PART}


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's JSON."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Ask:
    """A checked request, but for the model's name."""
    messages: list
    max_tokens: int
    seed: int
    stream: bool = False
    include_usage: bool = False                              # stream_options: usage in a last chunk
    stop: list = field(default_factory=list)
    logprobs: bool = False
    top: int = 0                                             # how many alternatives for each token
    sampling: dict = field(default_factory=dict)             # options of generate.sample


def read_json(body):
    """Bytes -> dict. Raises ApiError 400: no UTF-8, no JSON, NaN, nested beyond reason, not an object."""
    def refuse(word):
        raise ValueError(f"{word} is no JSON")
    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else str(e).partition(";")[0][:100]       # without Python's advice
        raise ApiError(400, f"the request's body is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request's body must be a JSON object")
    return {key: v for key, v in value.items() if v is not None}         # clients write null for what they leave out


def number(body, name, default, low, high, kind=float):
    """body[name] as a number in [low, high]; the default is the server's own and taken as it is."""
    value = body.get(name, default)
    if name not in body:
        return value
    fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not fits or not low <= value <= high:                 # which infinity is not
        raise ApiError(400, f"{name} must be {'a number' if kind is float else 'an integer'} from {low} to {high}, got {short(value)}", name)
    return kind(value)


def flag(body, name):
    if not isinstance(body.get(name, False), bool):
        raise ApiError(400, f"{name} must be true or false, got {short(body[name])}", name)
    return body.get(name, False)


def short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_messages(messages):
    """The messages as the chat template wants them: [system,] user, assistant, user, …, user. Raises ApiError 400."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    out = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object with role and content", where)
        message = {key: value for key, value in message.items() if value is not None}
        if message.get("role") == "developer":               # OpenAI's newer name
            message["role"] = "system"
        if message.get("role") not in ROLES:
            raise ApiError(400, f"{where}: unknown role {short(message.get('role'))}; the roles are {', '.join(ROLES)}", f"{where}.role")
        if others := message.keys() - {"role", "content"}:
            raise ApiError(400, f"{where}: {short(sorted(others)[0])} is not supported; a message has a role and a content", where)
        content = message.get("content", "")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not content.strip() and message["role"] != "assistant":     # an answer may have been empty
            raise ApiError(400, f"{where}: content must be text that is not empty", f"{where}.content")
        out.append({"role": message["role"], "content": content})
    roles = [m["role"] for m in out]
    roles = roles[1:] if roles[0] == "system" else roles
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ApiError(400, "after an optional system message, user and assistant must take turns, beginning and ending with the user", "messages")
    return out


def read_ask(body, defaults, most):
    """A request's dict (from read_json) -> Ask. What it leaves out is in `defaults` (options of generate.sample); `most`: tokens of the
    longest answer; a request for more gets as many. Raises ApiError 400 for what is unknown, unsupported or out of range."""
    for name, value in body.items():
        if name not in KNOWN:
            raise ApiError(400, f"unknown parameter {short(name)}", name[:60])
        if name in FIXED and (type(value), value) not in [(type(v), v) for v in FIXED[name]]:
            raise ApiError(400, f"{name} {short(value)} is not supported here; leave it out" + (", and ask n times" if name == "n" else ""), name)
    tokens = number(body, "max_tokens", most, 1, 2**31, int)
    tokens = number(body, "max_completion_tokens", tokens, 1, 2**31, int)                 # OpenAI's newer name
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise ApiError(400, "stop must be a string or a list of at most 4, each of 1 to 256 characters", "stop")
    stream, options = flag(body, "stream"), body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"} or options and not stream:
        raise ApiError(400, 'stream_options goes with "stream": true and holds include_usage', "stream_options")
    logprobs = flag(body, "logprobs")
    if body.get("top_logprobs") and not logprobs:
        raise ApiError(400, 'top_logprobs goes with "logprobs": true', "top_logprobs")
    sampling = defaults | {"temperature": number(body, "temperature", defaults["temperature"], 0, 2),
                           "top_p": number(body, "top_p", defaults["top_p"], 0, 1),
                           "top_k": number(body, "top_k", defaults["top_k"], 0, 2**31, int),
                           "min_p": number(body, "min_p", defaults["min_p"], 0, 1),
                           "repetition_penalty": number(body, "repetition_penalty", defaults["repetition_penalty"], 0.1, 10)}
    return Ask(read_messages(body.get("messages")), min(tokens, most), number(body, "seed", secrets.randbits(62), -2**63, 2**63 - 1, int), stream,
               flag(options, "include_usage"), stop, logprobs, number(body, "top_logprobs", 0, 0, 20, int), sampling)
