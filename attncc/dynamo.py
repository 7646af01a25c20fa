"""The backend under the name by which `torch.compile` and other programs reach it; it lives in `attncc.driver`."""

from attncc.driver.backend import Collected, attncc_backend, collecting

__all__ = ["Collected", "attncc_backend", "collecting"]
