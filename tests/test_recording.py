"""Recorded calls of operators."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ktcore
from ktcore import _native, ops
from ktcore.ops.recording import record
from ktcore.testing.cases import inputs

pytestmark = pytest.mark.skipif(_native.ext is None, reason="there is nothing to record")


def test_a_recording_makes_the_calls_again():
    matrix = inputs.matrix("int8", 48, 65)
    weight, x = torch.ones(48), torch.randn(2, 65)

    def call():
        return ops.rms_norm(ops.linear(x, matrix), weight)

    with torch.inference_mode():
        call()  # packs the weight
        y, recording = record(call)
        assert recording.why_not is None and len(recording) == 2
        x.normal_()
        expected = call()
        assert not torch.equal(y, expected)
        recording.run()
        assert torch.equal(y, expected)


def test_other_backends_are_not_recorded():
    matrix = inputs.matrix("int8", 48, 65)
    with torch.inference_mode(), ktcore.use("reference"):
        _, recording = record(lambda: ops.linear(torch.ones(2, 65), matrix))
    assert "linear of reference" in recording.why_not
    with pytest.raises(RuntimeError, match=r"cannot be made again: .*linear of reference"):
        recording.run()


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        (lambda y: y + 1, "aten.add.Tensor"),
        (lambda y: y.clone(), "aten.clone"),
        (lambda y: y.to(torch.float64), "aten.to.dtype"),
        (lambda y: y.t().contiguous(), "aten.contiguous"),
        (lambda y: y.mul_(2), "aten.mul_.Tensor"),
    ],
)
def test_what_torch_computes_cannot_be_recorded(foreign, named):
    weight, x = torch.ones(65), torch.randn(2, 65)
    with torch.inference_mode():
        _, recording = record(lambda: foreign(ops.rms_norm(x, weight)))
    assert named in recording.why_not


def test_views_can_be_recorded_and_recordings_do_not_nest():
    weight, x = torch.ones(8), torch.randn(2, 32)
    with torch.inference_mode():
        _, recording = record(lambda: ops.rms_norm(x.unflatten(-1, (4, 8))[:, 1:3], weight))
        assert recording.why_not is None and len(recording) == 1
        with pytest.raises(RuntimeError, match="being made on this thread already"):
            record(lambda: record(lambda: None))
        _, recording = record(lambda: ops.rms_norm(x, torch.ones(32)))  # made meanwhile: a value
    assert "aten.ones" in recording.why_not
    _, recording = record(lambda: ops.rms_norm(x, torch.full((32,), 2.0)))
    assert "ktcore.rms_norm" in recording.why_not  # outside of inference mode torch must see it


def test_a_recording_ends_where_the_function_fails():
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        record(fail)
    with torch.inference_mode():
        _, recording = record(lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8)))
    assert len(recording) <= 1


def test_a_recording_does_not_import_torchs_compiler():
    code = (
        "import sys, torch\n"
        "from ktcore import ops\n"
        "from ktcore.ops.recording import record\n"
        "with torch.inference_mode():\n"
        "    record(lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8)))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
