"""IR to nodes of ONNX."""

from attncc.codegen.onnx.attention import STANDARD, Row, attention
from attncc.codegen.onnx.emitter import Inexpressible
from attncc.codegen.onnx.nodes import Nodes, Value

__all__ = ["STANDARD", "Inexpressible", "Nodes", "Row", "Value", "attention"]
