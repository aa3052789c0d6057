"""Proves bundles with nothing but a runtime: `python bare_proof.py < cases.json`, one JSON line of outcomes.

The packages that only the making of files needs cannot be imported here; a case is a folder, or a folder and a runtime.
"""

import json
import sys

HIDDEN = ("torch", "torchvision", "timm", "onnxscript", "onnxsim", "onnx_ir", "sklearn", "matplotlib")


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}: it is hidden in this test", name=name)


sys.meta_path.insert(0, Hide())

from tokexport.engines.bundle.proof import verify_bundle  # noqa: E402
from tokexport.export.errors import UsageError  # noqa: E402

outcomes = []
for folder, runtime in json.load(sys.stdin):
    try:
        report = verify_bundle(folder, runtime)
        outcomes.append({"passed": report.passed, "text": report.summary(), "report": report.to_json()})
    except UsageError as e:
        outcomes.append({"passed": None, "text": str(e)})
assert not set(HIDDEN) & {name.partition(".")[0] for name in sys.modules}
print(json.dumps(outcomes))
