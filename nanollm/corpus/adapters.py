"""Rows as the notes' sources publish them -> documents, chats and preference pairs in one form.

`adapt(row)` gives (text, meta, reason). meta is {} for a document, {"messages": [{"role", "content"}, …]} for a chat and
{"prompt": messages, "chosen": str, "rejected": str} for a pair; text is then all contents joined by newlines, so that
filters and deduplication see them. reason is None, or why the row is dropped: it could be read, but a rule of its source
or the form of a chat says no. A row that is not of the promised shape raises ValueError(code) and belongs in quarantine:
not_an_object, missing_text, bad_type, not_utf8, unknown_role. Nothing is cut here, and nothing made a string by force.

adapter            published as                                                                     shape checked in
baike              563w_baidubaike: {title, summary, sections: [{title, content}], tags, url}       its users' code and a row
wikipedia_cn       wikipedia-cn-20230720-filtered: {completion, source}                             its users' code
text               SkyPile-150B, shibing624/medical (pretrain), c4, any other {text}                its loader; SkyPile: notes
webtext2019zh      {qid, title, desc, topic, star, content, answer_id, answerer_tags}               its README
baike_qa2019       {qid, category, title, desc, answer}                                             README of baike2018qa
zhihu_kol          Zhihu-KOL: {INSTRUCTION, RESPONSE, SOURCE, METADATA}                             dataset card
firefly            firefly-train-1.1M: {kind, input, target}                                        its users' code
firefly_multiturn  {conversation: [{human, assistant}, …]}                                          real rows
messages           OpenAI: {messages: [{role, content}, …]}                                         (a standard)
sharegpt           ShareGPT, BELLE train_3.5M, ruozhiout_qa_cn: {conversations: [{from, value}]}    READMEs, real rows
alpaca             alpaca, BELLE, medical (finetune): {instruction, input, output}; BELLE           READMEs, real rows
                   multiturn_chat_0.8M with "Human:…\\nAssistant:" as its instruction; ruozhiba
                   {instruction, output} and {query, response}; {prompt, response}; …
medical_reward     shibing624/medical (reward): {question, response_chosen, response_rejected}      its loader
huozi              huozi_rlhf_data_json: {prompt, chosen, reject}, newlines written as \\n           its users' code
preference         rlhf-reward-single-round-trans_chinese: {prompt, chosen, rejected}; hh-rlhf      dataset cards; hh: memory
                   {chosen, rejected} as transcripts; sides as strings, messages, lists
web_page           what `foreign.read_warc` yields: {url, mime, ok, text}                           (ours)
article             any other {title?, content}

The thresholds of the question-and-answer sources are those of charent/ChatLM-mini-Chinese, which the notes follow.
"""
import re
from functools import lru_cache

from nanollm.config import UserError

MIN_STAR = 5                              # webtext2019zh: likes of an answer
MAX_DICE = 0.9                            # a description this similar to its title says nothing new
ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
         "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function": "tool"}
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "answer", "response")

PAGES = ("text/html", "application/xhtml+xml", "text/plain")
SURROGATE = re.compile("[\ud800-\udfff]")
# A speaker at the start of a line, or an open "Assistant:" that ends the prompt on the same line.
SPEAKER = re.compile(r"(?:\A|\n)\s{0,4}(Human|Assistant)[:：]|\s(Assistant)[:：]\s*\Z")


# ---- values ----------------------------------------------------------------------------------------------------------

def string(value):
    """`value` if it is a str. JSON may hold half of a surrogate pair, which is no character and cannot be written: U+FFFD.
    Raises ValueError: "missing_text" for None, "not_utf8" for bytes (that the reader could not decode), "bad_type" for
    anything else (NaN, numbers, lists)."""
    if not isinstance(value, str):
        raise ValueError("missing_text" if value is None else "not_utf8" if isinstance(value, bytes) else "bad_type")
    return value if value.isascii() else SURROGATE.sub("\ufffd", value)


def optional(value):
    """The same, but None is an empty text."""
    return "" if value is None else string(value)


def items(value):
    """A list of objects, or ValueError("bad_type")."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("bad_type")
    return value


def dice(a, b):
    """Dice similarity of two texts as sets of characters, 2|A∩B| / (|A|+|B|), in 0..1 (Dice 1945)."""
    a, b = set(a), set(b)
    return 2 * len(a & b) / max(len(a) + len(b), 1)


# ---- messages --------------------------------------------------------------------------------------------------------

def said(role, content):
    return {"role": role, "content": string(content)}


def turns(rows):
    """[{role, content} or {from, value}, …] -> [{"role", "content"[, "weight"]}, …] with our four roles."""
    messages = []
    for row in items(rows):
        role, content = (row[a] if row.get(a) is not None else row.get(b) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError("unknown_role")
        messages.append(said(ROLES[role], content) | ({"weight": row["weight"]} if row.get("weight") is not None else {}))
    return messages


def transcript(text):
    """"Human: a\\nAssistant: b" -> messages, or [] if the text does not begin with a human's turn."""
    marks = list(SPEAKER.finditer(text))
    if not marks or text[:marks[0].start()].strip() or marks[0][1] != "Human":
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [said("user" if mark[1] == "Human" else "assistant", text[mark.end():end].strip()) for mark, end in zip(marks, ends)]


def asked(text):
    """A prompt as messages: the turns of a transcript with an open "Assistant:" at its end, else one question."""
    messages = transcript(text)
    return messages[:-1] if messages and messages[-1] == said("assistant", "") else [said("user", text)]


def question(row):
    """The messages before the answer: system, history and prompt, whatever the source calls them; [] if it has none."""
    system = [said("system", row["system"])] if optional(row.get("system")) else []
    for key in ("messages", "conversations", "prompt"):
        if row.get(key) is not None and not (key == "prompt" and isinstance(row[key], str)):
            messages = turns(row[key])
            return messages if [m["role"] for m in messages[:1]] == ["system"] else system + messages
    key = next((key for key in QUESTIONS if row.get(key) is not None), None)
    if key is None:
        return []
    text, history = string(row[key]), row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("bad_type")
    if key == "instruction" and optional(row.get("input")).strip():
        text = f"{text.strip()}\n{row['input'].strip()}".strip()
    return system + [said(role, t) for pair in history for role, t in zip(("user", "assistant"), pair)] + asked(text)


def unfit(messages):
    """Why these messages are no chat that ends with an answer, or None. A tool's result stands where a user would."""
    roles = [m["role"] for m in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    roles = roles[:1] + ["user" if role == "tool" else role for role in roles[1:]]
    if roles[-1:] != ["assistant"]:
        return "no_answer"
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return "bad_turns"
    return None if all(m["content"].strip() for m in messages) else "empty_message"


def chat(messages, reason=None):
    """(text, meta, reason) of a chat; `reason` is a rule of the source that comes before those of every chat."""
    return "\n".join(m["content"] for m in messages), {"messages": messages}, reason or unfit(messages)


def answered(title, description, answer, min_question, min_answer, reason=None):
    """A chat of one question and one answer, with the least number of characters of each."""
    title, description, answer = optional(title).strip(), optional(description).strip(), string(answer)
    if description and dice(title, description) < MAX_DICE:
        title = f"{title}\n{description}".strip()
    reason = reason or ("short_question" if len(title) < min_question else
                        "short_answer" if len(answer.strip()) < min_answer else None)
    return chat([said("user", title), said("assistant", answer)], reason)


# ---- one function a source: row -> (text, meta, reason) --------------------------------------------------------------

def article(row):
    """{title?, content}: any other row whose text is called so."""
    return "\n".join(filter(None, [optional(row.get("title")), string(row["content"])])), {}, None


def plain(row):
    return string(row.get("text")), {}, None


def wikipedia_cn(row):
    return string(row.get("completion")), {}, None


def baike(row):
    """Title, summary and every section, a paragraph each. Articles without sections are articles too."""
    if all(row.get(key) is None for key in ("title", "summary", "sections")):
        raise ValueError("missing_text")
    parts = [(row.get("title"), row.get("summary"))]
    parts += [(section.get("title"), section.get("content")) for section in items(row.get("sections") or [])]
    pairs = [[text for text in map(optional, pair) if text.strip()] for pair in parts]
    return "\n".join("：".join(pair) for pair in pairs if pair), {}, None


def webtext2019zh(row):
    star = row.get("star")
    if isinstance(star, bool) or not isinstance(star, int):
        raise ValueError("bad_type")
    return answered(row.get("title"), row.get("desc"), row.get("content"), 3, 10, "low_star" if star < MIN_STAR else None)


def baike_qa2019(row):
    return answered(row.get("title"), row.get("desc"), row.get("answer"), 3, 15)


def zhihu_kol(row):
    return answered(row.get("INSTRUCTION"), None, row.get("RESPONSE"), 4, 10)


def firefly(row):
    return chat([said("user", row.get("input")), said("assistant", row.get("target"))])


def firefly_multiturn(row):
    system = [said("system", row["system"])] if optional(row.get("system")) else []
    return chat(system + [said(role, turn.get(key)) for turn in items(row.get("conversation"))
                          for role, key in (("user", "human"), ("assistant", "assistant"))])


def conversation(row):
    if row.get("messages") is None and row.get("conversations") is None:
        raise ValueError("missing_text")
    return chat(question(row))


def alpaca(row):
    answer = next((row[key] for key in ANSWERS if row.get(key) is not None), None)
    return chat(question(row) + (turns(answer) if isinstance(answer, list) else [said("assistant", answer)]))


def side(answer, whole):
    """One side of a pair as messages: a text, one message, a list, or (`whole`) a transcript that holds the prompt too."""
    if isinstance(answer, (dict, list)):
        return turns(answer if isinstance(answer, list) else [answer])
    return whole and transcript(string(answer)) or [said("assistant", answer)]


def preference(row, rejected="rejected"):
    """A pair; the turns that both sides share belong to the prompt."""
    prompt = question(row)
    sides = [side(row.get(key), whole=not prompt) for key in ("chosen", rejected)]
    shared = 0
    while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    prompt = prompt if prompt == sides[0][:shared] else prompt + sides[0][:shared]
    text = "\n".join(m["content"] for m in prompt + sides[0][shared:] + sides[1][shared:])
    if any(len(answer) != shared + 1 for answer in sides):
        return text, {}, "bad_turns"
    chosen, rejected = sides[0][-1], sides[1][-1]
    reason = unfit([*prompt, chosen]) or unfit([*prompt, rejected])
    same = chosen["content"].strip() == rejected["content"].strip()
    return (text, {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]},
            reason or ("same_answers" if same else None))


def medical_reward(row):
    return preference({"question": row.get("question"), "chosen": row.get("response_chosen"), "rejected": row.get("response_rejected")})


def huozi(row):
    row = {key: string(row.get(key)).replace("\\n", "\n") for key in ("prompt", "chosen", "reject")}
    return preference(row, rejected="reject")


def web_page(row):
    """`ok`: the server answered 200. An error page or an image is no document."""
    reason = "http_error" if not row.get("ok") else None if row.get("mime") in PAGES else "not_html"
    return string(row.get("text")), {}, reason


# The keys that give a row away, most telling first: pairs, then chats, then documents.
ADAPTERS = {
    "medical_reward": (medical_reward, ["response_chosen response_rejected"]),
    "huozi": (huozi, ["prompt chosen reject"]),
    "preference": (preference, ["chosen rejected"]),
    "webtext2019zh": (webtext2019zh, ["title content star"]),
    "baike_qa2019": (baike_qa2019, ["title desc answer"]),
    "zhihu_kol": (zhihu_kol, ["INSTRUCTION RESPONSE"]),
    "firefly_multiturn": (firefly_multiturn, ["conversation"]),
    "messages": (conversation, ["messages"]),
    "sharegpt": (conversation, ["conversations"]),
    "firefly": (firefly, ["input target"]),
    "alpaca": (alpaca, [f"{q} {a}" for q in QUESTIONS for a in ANSWERS]),
    "baike": (baike, ["title summary", "title sections"]),
    "wikipedia_cn": (wikipedia_cn, ["completion source"]),
    "web_page": (web_page, ["mime ok text"]),
    "text": (plain, ["text"]),
    "article": (article, ["content"]),
}


@lru_cache(1024)
def adapter_for(keys):
    return next((name for name, (_, shapes) in ADAPTERS.items() for shape in shapes if set(shape.split()) <= set(keys)), None)


def detect(row):
    """The adapter whose keys the row has, or None. Keys with a value count first: a table fills the others with null."""
    name = adapter_for(tuple(key for key, value in row.items() if value is not None))
    return adapter_for(tuple(row)) if name in (None, "article") else name      # article: only where nothing else fits


def adapt(row, name="auto"):
    """(text, meta, reason) of a row, see the top of this file. Raises ValueError(code) for a row that belongs in
    quarantine, UserError for a name that is no adapter."""
    if name != "auto" and name not in ADAPTERS:
        raise UserError(f"adapter {name!r} is none of auto, {', '.join(ADAPTERS)}")
    if not isinstance(row, dict):
        raise ValueError("not_an_object")
    name = detect(row) if name == "auto" else name
    if name is None:
        raise ValueError("missing_text")
    return ADAPTERS[name][0](row)
