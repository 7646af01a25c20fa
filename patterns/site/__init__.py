"""From a product of two tensors to the attention that it is: frames, operands, masks, the finished site.

Recognisers (`softmax`, `linear`) are written with what is named here: all that they need of this room and of those
below."""

from attncc.patterns.reader import (
    CASTS,
    DOT,
    ELEMENTS,
    EXPS,
    MAXES,
    MOVES,
    SUMS,
    SUMS_AND_MEANS,
    Context,
    Contraction,
    Data,
    Facts,
    Move,
    Place,
    Point,
    Reach,
    Reader,
    Unreadable,
    alike,
    argument,
    broadcast,
    contraction,
    exponent,
    factored,
    few,
    fitted,
    has_argument,
    hint,
    input_at,
    is_learned,
    is_maximum,
    is_operator,
    log_sigmoid,
    mixture,
    move,
    number,
    one_dim,
    op_name,
    reduction,
    scaled_by,
    scattered,
    skip_casts,
    spelled_out,
    stops,
    summed_pair,
    swapped,
    tensor,
    unexpanded,
    written,
    written_args,
)
from attncc.patterns.refusals import compares, of_scores
from attncc.patterns.site.assemble import Lifted, Piece, assembled, sees_itself
from attncc.patterns.site.declare import Declared
from attncc.patterns.site.flow import agrees
from attncc.patterns.site.frames import Frame, frame, framed
from attncc.patterns.site.masks import hidden_by, split_mask, visible_where
from attncc.patterns.site.materialised import Source, einsum, summed
from attncc.patterns.site.operands import operand
from attncc.patterns.site.parts import Lse, Parts, Rows
from attncc.patterns.site.products import Overwritten, Product, products_in, stored

__all__ = [
    "CASTS", "DOT", "ELEMENTS", "EXPS", "MAXES", "MOVES", "SUMS", "SUMS_AND_MEANS", "Context", "Contraction",
    "Data", "Declared", "Facts", "Frame", "Lifted", "Lse", "Move", "Overwritten", "Parts", "Piece", "Place", "Point",
    "Product", "Reach", "Reader", "Rows", "Source", "Unreadable", "agrees", "alike", "argument", "assembled",
    "broadcast", "compares", "contraction", "einsum", "exponent", "factored", "few", "fitted", "frame", "framed",
    "has_argument", "hidden_by", "hint", "input_at", "is_learned", "is_maximum", "is_operator", "log_sigmoid",
    "mixture", "move", "number", "of_scores", "one_dim", "op_name", "operand", "products_in", "reduction",
    "scaled_by", "scattered", "sees_itself", "skip_casts", "spelled_out", "split_mask", "stops", "stored", "summed",
    "summed_pair", "swapped", "tensor", "unexpanded", "visible_where", "written", "written_args",
]  # fmt: skip
