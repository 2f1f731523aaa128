"""Beam search: the likeliest whole answer in place of the likeliest next token."""
import torch

from nanollm.decode import cache_for, reader
from nanollm.generate import penalise


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beams, length_penalty=1.0, stop_ids=(), repetition_penalty=1.0, no_repeat_ngram=0):
    """The likeliest answers that are found by going on, token by token, with the `beams` likeliest beginnings only:
    up to `beams` of (list of new ids, score), the best first. Nothing is drawn by chance.

    score = log p(answer) / length ** length_penalty, the length in tokens: 0 prefers short answers, since each token costs
    probability, 1 compares means, more prefers long ones. A stop id counts in both and is not returned. An answer is complete
    with a stop id that is among the `beams` likeliest continuations, or after max_new_tokens (at least 1) or at the end of the
    context. The search ends when `beams` answers are complete and the best beginning is, at its length, no better than the worst
    of them: that is transformers' rule (early_stopping=False), which may miss a better, longer answer."""
    room = model.args.max_seq_len
    ids = list(ids)[-(room - 1):]
    device, cache = next(model.parameters()).device, cache_for(model, min(len(ids) + max_new_tokens, room))
    read = reader(model, cache, beams)
    end = max_new_tokens if cache.endless else min(max_new_tokens, room - len(ids))
    texts, scores, fresh, complete = [[]], [0.0], [ids], []
    for n in range(1, end + 1):
        logits = read(torch.tensor(fresh, device=device))                                                                    # (beams, V), at first (1, V)
        logps = penalise(logits.float().log_softmax(-1), [ids + text for text in texts], repetition_penalty, no_repeat_ngram)
        logps = logps + torch.tensor(scores, device=device)[:, None]                                                         # of the whole text
        best = logps.flatten().topk(min(max(2, 1 + len(stop_ids)) * beams, logps.numel()))           # so many that `beams` of them go on
        going = []
        for place, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            row, token = divmod(at, logps.size(1))
            if n < end and token not in stop_ids:
                going.append((score, row, token))
            elif place < beams:
                complete.append((texts[row] + [token] * (token not in stop_ids), score / n**length_penalty))
        going = going[:beams]
        complete = sorted(complete, key=lambda answer: -answer[1])[:beams]
        if not going or len(complete) == beams and going[0][0] / n**length_penalty <= complete[-1][1]:
            break
        scores, rows, tokens = map(list, zip(*going))
        texts, fresh = [texts[row] + [token] for row, token in zip(rows, tokens)], [[token] for token in tokens]
        cache.keep(torch.tensor(rows, device=device))
    return complete
