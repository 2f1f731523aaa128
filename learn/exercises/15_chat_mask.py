"""15  Chat mask: learn to answer, not to ask.

中文：实现对话掩码：只在助手回答及其结束符上计算损失，并把目标右移一位。

A conversation becomes one row of tokens: for each message <|im_start|>, the role and a newline, the content, <|im_end|>, a newline (ChatML). The
model must learn what the assistant says and when it stops, so the targets are the contents of all assistant messages and the <|im_end|> behind
each, and nothing else: not the questions, not the headers, which the chat program writes itself, not the newline behind <|im_end|>. The target of
position t is the token that comes after it: inputs and targets are shifted by one.

    ids      <|im_start|> user \\n  Hi  <|im_end|> \\n  <|im_start|> assistant \\n  Yo  <|im_end|> \\n
    learnt         -       -    -   -       -       -        -           -      -   yes     yes      -
    inputs = ids[:-1],   targets[t] = ids[t + 1] if that one is learnt, else -100

Ouyang et al. 2022 (arXiv:2203.02155) train on such demonstrations. The solution: `render` in nanollm/tokenizer.py, and the shift in
`ChatRows` of nanollm/data.py. Judge:  python -m learn.exercises 15
"""


def chat_targets(tok, messages):
    """messages: list of {"role": "system" | "user" | "assistant", "content": str}. tok.encode(text) -> list of ids; tok.im_start_id and
    tok.im_end_id are ids. -> (inputs, targets), two lists of one length; -100 where nothing is learnt.

    Encode each segment alone: the header role + "\\n", the content, the newline."""
    # Hint 1: build two lists side by side, ids and mask; write a small inner function add(segment, learnt).
    # Hint 2: what is learnt is add(tok.encode(content) + [tok.im_end_id], role == "assistant"); the other two segments never are.
    # Hint 3: shift at the end, ids and mask alike: zip(ids[1:], mask[1:]).
    raise NotImplementedError("write chat_targets")
