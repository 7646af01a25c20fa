"""IR to nodes of ONNX."""

from attncc.codegen.onnx.attention import Inexpressible, attention
from attncc.codegen.onnx.nodes import Nodes, Value

__all__ = ["Inexpressible", "Nodes", "Value", "attention"]
