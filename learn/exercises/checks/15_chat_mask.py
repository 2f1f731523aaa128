"""What is asked of exercise 15, and the solution: nanollm.tokenizer.render, shifted as nanollm.data does it."""
from learn.exercises.judge import Hint, equal, parts
from nanollm.tokenizer import bpe_tokenizer, pattern_for, render

NAME = "chat_targets"
TOK = bpe_tokenizer([], pattern_for(512))                        # the ids are the bytes: easy to read
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo, 好"}]
TWO = [{"role": "system", "content": "Be brief."}, *TALK, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"}]


def reference(tok, messages):
    ids, mask = render(tok, messages)
    return ids[:-1], [t if m else -100 for t, m in zip(ids[1:], mask[1:])]


def text(ids):
    """Ids as text, for a hint."""
    names = {TOK.im_start_id: "<|im_start|>", TOK.im_end_id: "<|im_end|>"}
    out, run = "", b""
    for i in [*ids, None]:
        if i is not None and i < 256:
            run += bytes([i])
        else:
            out, run = out + run.decode("utf-8", "replace") + names.get(i, "" if i is None else f"<{i}>"), b""
    return out


def pair(attempt, messages):
    inputs, targets = parts(attempt(TOK, messages), ("inputs", "targets"))
    return list(inputs), list(targets)


def the_inputs(attempt):
    """the inputs: the whole conversation but its last token"""
    got, (ids, _) = pair(attempt, TALK)[0], render(TOK, TALK)
    if got != ids[:-1]:
        joined = [i for m in TALK for i in (TOK.im_start_id, *TOK.encode(m["role"] + "\n" + m["content"]), TOK.im_end_id)]
        for sentence, value in {"the last token is an input too; it has no successor, so inputs = ids[:-1]": ids,
        "the first token is missing: inputs = ids[:-1], targets come from ids[1:]": ids[1:],
                                "the newline behind <|im_end|> is missing": joined[:-1],
                                "the newline behind <|im_end|> is missing, and inputs = ids[:-1]": joined,
                                "the text <|im_start|> was encoded letter by letter; take the id, tok.im_start_id": None}.items():
            if got == value or value is None and TOK.encode("<|im_start|>")[:6] == got[:6]:
                raise Hint(sentence)
        raise Hint(f"the inputs read {text(got)!r}, expected {text(ids[:-1])!r}")


def one_turn(attempt):
    """the targets: the answer and the <|im_end|> behind it"""
    judge_targets(attempt, TALK)


def judge_targets(attempt, messages):
    got, (inputs, want) = pair(attempt, messages)[1], reference(TOK, messages)
    if got == want:
        return
    ids, mask = render(TOK, messages)
    shifted = lambda m: [t if learn else -100 for t, learn in zip(ids[1:], m[1:])]
    end, newline = TOK.im_end_id, TOK.encode("\n")
    ends = [i for i, t in enumerate(ids) if t == end]
    without_end = [m and t != end for t, m in zip(ids, mask)]
    with_newline = [m or (i and ids[i - 1] == end and mask[i - 1]) for i, m in enumerate(mask)]
    all_ends = [m or t == end for t, m in zip(ids, mask)]
    contents, headers, turn = [], [], None
    for i, t in enumerate(ids):                                  # which message is this? 0 the header, 1 behind it
        turn = 0 if t == TOK.im_start_id else 1 if turn == 0 and ids[i - 1 : i] == newline else turn
        contents.append(bool(turn) and not (i and ids[i - 1] == end))
        headers.append(mask[i] or turn == 0 and any(mask[i:min(e for e in ends if e >= i) + 1]))
    header_words = [h and t != TOK.im_start_id for h, t in zip(headers, ids)]
    last = [m and i > ends[-2] for i, m in enumerate(mask)]
    equal(len(got), len(want), "the length of the targets", {
        "the targets are one longer than the inputs: drop the first, ids[1:]": len(ids)})
    mistakes = {
        "everything is learnt, the questions and headers too: -100 where the assistant does not speak": ids[1:],
        "the targets are not shifted: target t is the token *after* input t, ids[t + 1]; the model would learn to copy":
            [t if m else -100 for t, m in zip(ids[:-1], mask[:-1])],
        "the mask is not shifted with the ids: target t is learnt if token t + 1 is, mask[1:]": [t if m else -100 for t, m in zip(ids[1:], mask[:-1])],
        "the targets are shifted to the wrong side": [-100, *[t if m else -100 for t, m in zip(ids[:-2], mask[:-2])]],
        "<|im_end|> behind the answer is not learnt: the model would never learn to stop": shifted(without_end),
        "the newline behind <|im_end|> is learnt; the chat stops at <|im_end|>, nobody will ever ask for it": shifted(with_newline),
        "the <|im_end|> of the questions is learnt, too; only those behind answers": shifted(all_ends),
        "the user's words are learnt, too": shifted(contents),
        "the header (assistant and newline) is learnt, too; the chat program writes it": shifted(headers),
        "the header (assistant and newline) is learnt, too; the chat program writes it ": shifted(header_words),
        "what is learnt is turned round: the answers are hidden and the rest is learnt": shifted([not m for m in mask]),
        "only the last answer is learnt; every assistant message is": shifted(last),
        "only the first answer is learnt; every assistant message is": shifted([m and i <= ends[-2] for i, m in enumerate(mask)]),
        "the places without loss hold 0; they must hold -100, 0 is a token": [0 if t == -100 else t for t in want],
        "the places without loss hold -1; cross-entropy ignores -100": [-1 if t == -100 else t for t in want],
        "the targets are the mask; where it is 1 the token is wanted": mask[1:]}
    for sentence, value in mistakes.items():
        if got == value:
            raise Hint(sentence)
    i = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
    name = f" ({text([want[i]])!r})" if want[i] >= 0 else ""
    raise Hint(f"target {i}, behind {text(inputs[max(0, i - 8):i + 1])!r}, is {got[i]}, expected {want[i]}{name}")


def turns(attempt):
    """every answer of a longer conversation, with a system message"""
    judge_targets(attempt, TWO)


def no_answer(attempt):
    """a conversation without an answer teaches nothing"""
    got = pair(attempt, TALK[:1])[1]
    if any(t != -100 for t in got):
        raise Hint("a question alone has a target: all should be -100")


CHECKS = [the_inputs, one_turn, turns, no_answer]
