"""Deployment: kernels are built and measured where the model is prepared, and a process that serves only loads them.

    python examples/deployment.py

The store of kernels is a folder (ATTNCC_CACHE_DIR). Copy it with the model to machines of the same kind, or share it;
see docs/store.md for who may write to it. Sizes that change between calls are compiled once, as symbols.
"""

import os
import subprocess
import sys
import tempfile
import time

SERVE = """
import time, torch, attncc
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(256, 4, 512, batch_first=True).eval()
model = torch.compile(layer, backend="attncc", dynamic=True)
with torch.no_grad(), attncc.record() as report:
    start = time.perf_counter()
    model(torch.randn(2, 384, 256))
    print(f"first call {time.perf_counter() - start:.1f} s: {report!r}")
"""

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folders = {"ATTNCC_CACHE_DIR": f"{folder}/attncc", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for who in ("preparing", "serving"):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", SERVE], env=os.environ | folders, text=True,
                                  capture_output=True, check=True)  # fmt: skip
            print(f"{who}: {done.stdout.strip()} (the process took {time.perf_counter() - start:.1f} s)")
