"""The policy that ranks patches of a grid over the whole map of a head, against its rule in plain loops."""

from __future__ import annotations

import torch
from policies.situations import B, D, Situation, applied, kept

from attncc.ir.reasons import because
from attncc.passes.policies import Draft


def test_patches_are_ranked_over_the_whole_map_and_each_keeps_its_best() -> None:
    """A grid of 6 x 8 tokens and 2 of text behind it, in patches of 2 x 4."""
    torch.manual_seed(0)
    policy = Draft((6, 8), (2, 4), 0.7, 2)
    for mask in ("all", "padded both ways"):
        s = Situation(mask, n=50, m=50, padding=(0, 9), dynamic=False)
        data = {n: x.double() if x.is_floating_point() else x for n, x in s.tensors().items()}
        found = kept(applied(policy, s.attention()), data, s)
        where = [t // 8 // 2 * 2 + t % 8 // 4 for t in range(48)]
        for b in range(B):
            there = [j for j in range(48) if "seen" not in data or bool(data["seen"][b, j])]
            for h in range(s.heads):
                rows, keys = ([[t for t in some if where[t] == n] for n in range(6)] for some in (range(48), there))
                x = torch.stack([data["q"][b, h, n].mean(0) for n in rows])
                y = torch.stack([data["k"][b, h, n].mean(0) if n else torch.full((D,), torch.nan) for n in keys])
                scores = (x @ y.T * 0.25).nan_to_num(-torch.inf)
                p = scores.softmax(-1)
                seen = torch.tensor([bool(n) for n in keys]).expand(6, 6)
                many = -(-int(seen.sum()) * 3 // 10)
                pairs = torch.zeros(36, dtype=torch.bool)
                pairs[p.masked_fill(~seen, -1).flatten().argsort(descending=True, stable=True)[:many]] = True
                pairs = pairs.reshape(6, 6) | (p == p.amax(-1, keepdim=True))
                for i in range(50):
                    for j in range(50):
                        visible = "seen" not in data or bool(data["seen"][b, j])
                        want = visible and (i >= 48 or j >= 48 or bool(pairs[where[i], where[j]]))
                        assert bool(found[b, h, i, j]) == want, (b, h, i, j)


def test_patches_keep_to_their_grid() -> None:
    policy = Draft((6, 8), (2, 4))
    larger = Situation("all", n=50, m=50, dynamic=False).attention()
    assert policy.applies(larger) == because("policy-other-grid", "6x8")
    causal = Situation("causal", n=48, m=48, dynamic=False).attention()
    assert policy.applies(causal) == because("policy-masked-grid")
