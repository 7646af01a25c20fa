"""Why an attention is left as it is, or fused: a code, what it is about, and one sentence for each code."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

_NO_PRODUCT = "the softmax's input is not a product of queries and keys: "
_NO_VALUES = "the softmax is not multiplied by values: "
_LINEAR = "linear attention, left with Inductor"

#: The sentence of each code. `{}` takes an argument: a name, a number, or another reason.
SENTENCES: dict[str, str] = {
    # --- scores that hold no product of queries and keys
    "no-scores": "the softmax's input is not a product of queries and keys",
    "scores-learned": _NO_PRODUCT + "its scores are learned themselves and depend on no token",
    "scores-distances": _NO_PRODUCT + "its scores are distances (cdist)",
    "scores-lengths": _NO_PRODUCT + "its scores are lengths of differences (linalg_vector_norm)",
    "scores-of-each-token": _NO_PRODUCT + "its scores are sums of elements of each token alone",
    "scores-additive": _NO_PRODUCT
    + "its scores are sums over pairs of elements that are not products of two (additive attention)",
    "scores-of-edges": _NO_PRODUCT
    + "its scores weight the elements of each pair's product by numbers of its own (edges)",
    "scores-layer-over-pairs": _NO_PRODUCT + "its scores come from a layer over pairs of tokens (additive attention)",
    "scores-layer-over-scores": _NO_PRODUCT + "its scores come from a layer over other scores ({})",
    "scores-layer": _NO_PRODUCT + "its scores come from a layer ({})",
    "scores-learned-product": _NO_PRODUCT + "its scores come from a product with learned weights ({})",
    "scores-chosen": _NO_PRODUCT + "its scores were picked out of others ({})",
    "scores-from-outside": _NO_PRODUCT + "its scores come into this graph from outside, as after a graph break",
    "scores-from": _NO_PRODUCT + "its scores come from {}",
    "scores-of-several-products": "its scores are put together from several products",
    "scores-negligible": "its scores are large numbers less their maximum, of which only rounding is left",
    "scores-widened": "its scores are computed in float64 from a product in {}",
    "scores-function": "its scores are {} of a product of queries and keys, which has no rule",
    "score-wraps": "its scores or mask need arithmetic of {} that may wrap",
    # --- softmaxes that weight no values
    "goes-to": _NO_VALUES + "it goes to {}",
    "goes-to-router": _NO_VALUES + "it goes to {}, as in a router",
    "goes-to-sum": _NO_VALUES + "it is added up once more (sum), as where weights are normalised twice",
    "goes-to-heads": _NO_VALUES + "it is added up over heads or rows, as where blocks are chosen by what they weigh",
    "goes-to-mean": _NO_VALUES + "it is averaged first (mean)",
    "goes-to-norm": _NO_VALUES + "it is normalised once more (layer_norm)",
    "goes-to-output": _NO_VALUES + "it goes to the output",
    "gates": _NO_VALUES + "it scales a tensor element by element and nothing is summed, as in a gate",
    "sums-branches": _NO_VALUES
    + "what it weights is summed element by element, as branches, levels and sampling points are",
    "weights-whole-tensors": (
        "{}; what it weights is summed element by element, as branches, levels and sampling points are"
    ),
    "keeps-largest": "only the largest of its weights are kept ({}), and the scores alone do not say which",
    "values-of-another": "what it weights is weighted by another attention, of which it is the values",
    "single-key": "there is a single key, so there is nothing to choose from",
    "single-key-softmax": "a softmax over a single key is always 1",
    "other-axis": "the softmax runs over another axis than the product sums over",
    "other-keys": "the softmax covers other keys than the product sums over",
    "vector-attention": "each component has weights of its own (vector attention)",
    "edge-softmax": (
        "a softmax over groups that are numbered in a tensor (edges of a graph): each row has keys of its own"
    ),
    "other-sum": "a quotient by a sum that is not that of the same exponentials over the keys",
    # --- what happens between the softmax and the values
    "dropout": "dropout is on",
    "weights-mixed": "its weights are mixed by a product with another computed tensor before they meet the values",
    "weights-through": "its weights go through {} before they meet the values, which is not read",
    "product-scales": "the product with the values also scales or adds",
    "hidden-keys-weighted": "keys that the mask hides may get weight after the softmax",
    "mixed-over-queries": "the weights are mixed over queries, not over heads",
    "mixture-part": "one part of a mixture of heads is not a softmax",
    "no-sum-of-softmaxes": "the weights are not a sum of softmaxes",
    "too-many-softmaxes": "the weights are a sum of too many softmaxes",
    "two-sinks": "a softmax with two sinks",
    "may-be-negative": "weights that may be negative are divided by their sum",
    "sum-may-be-zero": "weights are divided by a sum that may be zero, which that of a softmax never is",
    "gradient-at-zero": "weights have gradients where they are zero, which those of a softmax do not have",
    "bias-unread": "a bias that cannot be read",
    "second-product": "a second product cannot be kept apart from the rest",
    # --- masks and rows
    "mask-of-scores": "which keys are hidden depends on the scores themselves, which a mask cannot express",
    "hidden-gradients": "rows whose keys are all hidden pass gradients to one part of their scores alone",
    "hidden-sums": "rows whose keys are all hidden have sums with gradients of their own",
    # --- pieces of a softmax and windows
    "piece-finite-window": "a window beside pieces of the softmax that are hidden by a finite number",
    "piece-hidden-gradients": "pieces of a softmax whose hidden keys pass gradients to their scores",
    "piece-window-sizes": "a window beside pieces of a softmax whose sizes are not known when compiling",
    "piece-stopped": "a piece of a softmax inside of which the model stops gradients",
    "piece-not-multiple": "a piece of a softmax whose weights are not a multiple of it",
    "piece-layout": "a piece of a softmax whose rows are laid out otherwise than those of the softmax",
    "piece-sizes": "pieces of a softmax, of unknown sizes, under finite masks",
    "window-outside": "columns whose key is outside of the sequence are not hidden",
    "window-empty-row": "a row that sees no key would weight columns whose key is outside of the sequence",
    "window-values": "values that are not read at a distance from their row",
    # --- SDPA and FlexAttention
    "ranks": "queries, keys and values of different ranks",
    "unknown-scale": "a scale that is not known when compiling",
    "largest-score": "the largest score of each row is asked for, which the IR does not give",
    "unknown-groups": "grouped heads whose number is not known when compiling",
    "flex-constant": "its {} does not depend on anything",
    "flex-no-rule": "its {} computes {}, which has no rule",
    "flex-no-mask-function": "its block mask hides keys by blocks alone, and its tables do not list each block of keys",
    "flex-computed-blocks": "its block mask is put together from tables that the model computes",
    # --- tensors
    "dtype": "a tensor of {}, which the IR has no type for",
    "written-unseen": "a tensor that the model writes to where autograd does not see it",
    "written-before": "a tensor that the model writes to between reading it and the attention",
    "weights-written": "a part of the weights is written to before they meet the values",
    "operand-written": "an operand that the model overwrites before the attention could read it",
    "product-written": "a product that the model writes to between computing it and the attention",
    "operand-layout": "an operand that is not laid out along the axes of the attention",
    # --- stopped gradients and transforms
    "stopped-inside": "the model stops gradients inside of it, in a way that was not read",
    "stopped-one-side": "gradients are stopped for the values alone, or for the sums of the rows alone",
    "stopped-quotient": "a quotient of exponentials and their sum of which the model stops the gradients of one",
    "transform": "under torch.func.{}, whose tensors a trace does not show",
    # --- without a softmax
    "no-softmax": "attention without a softmax: {}",
    "late-division": "a softmax divided after its product: {}",
    "one-operation": "it is one operation, and what that does is not in the graph ({})",
    "unknown-normaliser": "weights divided by the {} of their scores, which is not a known normaliser",
    "unknown-function": "its weights are {} of scores, which has no rule",
    # --- gates and modulations, which Inductor fuses
    "additive-gate": "an additive gate: elements are scaled by a function of two layers added, and no keys are summed",
    "squeeze-excite": "a gate of channels (squeeze and excite): channels are scaled by a function of their means over "
    "places, and no keys are summed",
    "gate": "a gate: elements are scaled by a function of layers over their surroundings, and no keys are summed",
    "gated-levels": "levels are scaled by gates and added up element by element, and no keys are summed",
    "modulation": "modulation: elements are scaled by what depthwise convolutions make of their surroundings, and no "
    "keys are summed",
    "dynamic-filters": "dynamic filters: a convolution by filters that are computed, which is one operation",
    "hard-attention": "each query takes the one key of its largest score (argmax, hard attention)",
    "weights-additive": "its weights are computed from pairs of tokens, added or side by side (additive attention)",
    # --- linear attention and recurrences
    "linear": _LINEAR + ": O(N) already",
    "linear-step": _LINEAR + ": one step of O(d e)",
    "linear-channels": _LINEAR + ": each channel is a head of its own, q * sum(k * v)",
    "linear-fused": "linear attention in one kernel: {}",
    "linear-products": "linear attention in one kernel that is as fast as the model's matrix products alone",
    "linear-slower": _LINEAR + ": {}",
    "linear-training": _LINEAR + " in training: {}",
    "linear-no-kernel": _LINEAR + ": no kernel ({})",
    "linear-not-measured": _LINEAR + ": not measured ({})",
    "linear-written-out": _LINEAR + ": it is written as (q k^T) v, with N x N weights, and q (k^T v) needs none",
    "running-sum": "its state is a running sum over tokens (cumsum): a recurrence, left with Inductor",
    "running-sum-of-chunks": (
        "its state is a running sum over chunks of tokens (cumsum): a recurrence, left with Inductor"
    ),
    "recurrence": "a recurrence over time: a state carried over {} of tokens, left with Inductor",
    "recurrence-unread": "a recurrence over time ({}): {}",
    "state-unread": "no query reads its state after the step",
    "steps-differ": "its steps are not alike",
    "steps-read-others": "its steps read different tensors",
    "state-not-sum": "its state is not a sum of what it was and what is written",
    "state-not-decayed": "what it carries on is not its state times a decay",
    "writes-no-product": "what it writes is not a key times a value",
    "delta-other-value": "what it subtracts from the value is not what its state holds for the key",
    "delta-other-key": "what it subtracts is held for another key than it writes",
    "key-of-several": "its key is made of several tensors",
    "value-of-several": "the value that it writes is made of several tensors",
    "rate-is-product": "its rate or decay is a product itself",
    # --- policies of a plan
    "policy-no-distance": "rows and keys have no positions in common (as in cross attention): it has no distances",
    "policy-no-heads": "it has no axis of heads, which the rule differs over",
    "policy-other-heads": "it has {} heads, the plan speaks of head {}",
    "policy-no-softmax": "its weights are no softmax of its scores, which the rule chooses by",
    "policy-sums-asked": "its weights or their sums are asked for, which have all keys",
    "policy-score-by-pair": "its scores are not of the product alone, and means of keys have no place",
    "policy-not-aligned": "its rows are not its keys one by one, so that no value is that of a row",
    "policy-no-width": "the width of its heads is known at the call alone",
    "policy-by-pair": "data hides keys from some rows of a sequence and not from others (documents, a mask per pair)",
    "policy-not-causal": "its rows do not each end with a last key, which the rule counts back from",
    "policy-many-rows": "it has more than {} rows, or a number known at the call alone, and each selects for itself",
    "policy-masked-grid": "its mask compares rows with keys, which patches of a grid do not follow",
    "policy-other-grid": "its tokens are no grid of {}",
    "pages-from-keys": "{}; the boxes of its pages are made of all keys in each call: {}",
    "cache-new": "they are no tensor that the graph is given as it reads it (a cache that grows is made anew)",
    "cache-read": "they are read otherwise than head by head",
    "cache-written": "the graph writes to them otherwise than once, at positions, before they are read",
    "cache-gradients": "gradients are wanted",
    "cache-device": "they are not on the CPU",
    "policy-other-length": "the plan holds for {} to {} keys",
    # --- the driver
    "planned": "as the plan says: {}",
    "plan-held": "{}; exact, although the plan has a form for it: {}",
    "plan-slower": "its form is no faster here: exact {} us, planned {} us",
    "plan-slower-training": "its form is no faster here with its backward: the model's own {} us, planned {} us",
    "plan-several": "the plan speaks of single attentions, and several are joined here",
    "weights-needed": "its scores or weights are used elsewhere too, by {}, and no fused kernel gives them",
    "graph-taken": "another site has taken what it reads",
    "graph-place-taken": "another site has taken its place already",
    "graph-sums-in-values": "its values are computed from the sums of its rows",
    "graph-writes-between": "the model writes to memory between the results of one softmax",
    "graph-nested-product": "one product of a softmax is computed from another",
    "graph-no-node": "no node of the captured graph holds {}",
    "graph-composite": "{} is several operations that cannot be taken apart",
    "graph-used-whole": "{} is used as a whole",
    "graph-size": "the size {} cannot be computed from the graph's inputs",
    "editing-failed": "editing the graph failed: {}",
    "compiling-failed": "the fused graph does not compile: {}",
    "reading-failed": "it could not be read: {}",
    "not-expressible": "the IR cannot express it: {}",
    "no-kernel": "{}",
    "cannot-lose": "faster than its two matrix products alone",
    "faster": "{}",
    "slower": "{}",
    "measuring-off": "not measured",
    "onnx-recurrence": "a recurrence over the turns of {} ({})",
    "onnx-attention": "it is ONNX's operator Attention already",
    "onnx-inexpressible": "no operator of ONNX computes it: {}",
    "not-measured": "not measured: {}",
    "training-not-measured": "in training not measured: {}",
}


@dataclass(frozen=True)
class Reason:
    """Why something became of an attention: `code` is one of `SENTENCES`, `args` are what its sentence names.

    `str()` is the sentence. Raises ValueError where the code is unknown or takes another number of arguments."""

    code: str
    args: tuple[str | Reason, ...] = ()

    def __post_init__(self) -> None:
        sentence = SENTENCES.get(self.code)
        if sentence is None:
            raise ValueError(f"no reason has the code {self.code!r}")
        takes = sum(name is not None for _, name, _, _ in Formatter().parse(sentence))
        if takes != len(self.args):
            raise ValueError(f"the reason {self.code!r} takes {takes} arguments, not {len(self.args)}")

    def __str__(self) -> str:
        return SENTENCES[self.code].format(*self.args)

    @property
    def codes(self) -> str:
        """Its code and those of the reasons in it, outermost first: `no-softmax/dropout`."""
        return "/".join([self.code, *(x.codes for x in self.args if isinstance(x, Reason))])


def because(code: str, *args: str | Reason) -> Reason:
    """`Reason(code, args)`."""
    return Reason(code, args)
