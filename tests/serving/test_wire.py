"""The REST wire format: what we write is read back, and whatever comes in is refused in words."""

import base64
import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visformer.serving.predict import files_of
from visformer.serving.refusals import Refusal
from visformer.serving.request import Output
from visformer.serving.wire import join_bytes, packed, read_infer, split_bytes, unpacked, write_infer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["image", "images", "other"]) | JSON,
        "datatype": st.sampled_from(["BYTES", "FP32", "INT64"]) | JSON,
        "shape": st.lists(st.integers(-2, 4), max_size=5) | JSON,
        "data": st.lists(st.floats() | st.text(max_size=4), max_size=4) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | JSON}) | JSON,
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=2) | JSON},
    optional={"id": JSON, "parameters": JSON, "outputs": st.lists(TENSOR, max_size=2) | JSON},
)


@given(st.lists(st.binary(max_size=30), max_size=6))
def test_bytes_tensors_are_read_back(elements):
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    assert split_bytes(join_bytes(array)) == elements


@given(st.binary(max_size=40))
def test_any_bytes_are_a_tensor_or_refused(raw):
    try:
        elements = split_bytes(raw)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert sum(4 + len(one) for one in elements) == len(raw)


@settings(max_examples=200, deadline=None)
@given(REQUEST, st.binary(max_size=30), st.none() | st.integers(-1, 10).map(str) | st.text(max_size=3))
def test_any_request_is_understood_or_refused(document, tail, length):
    body = json.dumps(document).encode()
    length = str(len(body)) if length is None else length
    try:
        request = read_infer(body + tail, length)
    except Refusal as refusal:
        assert refusal.status == 400
        assert refusal.message
    else:
        assert (request.images is None) != (request.tensor is None)
        assert request.wanted


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["", "b", "x-y"]), st.binary(max_size=100))
def test_any_form_is_understood_or_refused(noise, boundary, data):
    body = b"--" + boundary.encode() + b'\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + data + noise
    try:
        assert all(
            isinstance(content, bytes) for _, content in files_of(body, f"multipart/form-data; boundary={boundary}", 4)
        )
    except Refusal as refusal:
        assert refusal.status == 400


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [1, 2]}, r"image: its shape must be \[n\] or \[n, 1\]"),
        ({"shape": [2]}, "image: 1 elements, where its shape says 2"),
        ({"shape": [2**40]}, "its shape must be a list"),
        ({"shape": True}, "its shape must be a list"),
        ({"datatype": "FP32"}, "image: its datatype must be BYTES"),
        ({"name": "picture"}, "picture: no such input; give image"),
        ({"data": ["not base64!"]}, "in JSON its data must be a list of strings"),
        ({"data": [7]}, "in JSON its data must be a list of strings"),
        ({"parameters": {"binary_data_size": 2**39}}, "binary_data_size is 549755813888, but 0 bytes are left"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size: must be a whole number"),
        ({"parameters": {"shared_memory_region": "x"}}, "shared memory is not supported"),
    ],
)
def test_a_wrong_input_is_named(change, reason):
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(b"x").decode()]}
    assert read_infer(json.dumps({"inputs": [image]}).encode(), None).images == [b"x"]
    with pytest.raises(Refusal, match=reason):
        read_infer(json.dumps({"inputs": [image | change]}).encode(), None)


@pytest.mark.parametrize("data", [["1", "2"], [True, False], [[1], [2, 3]], [None, 1], {"a": 1}, [10**400, 1], "12"])
def test_a_tensor_in_json_is_numbers(data):
    entry = {"name": "images", "datatype": "FP32", "shape": [1, 1, 1, 2], "data": data}
    with pytest.raises(Refusal, match="images"):
        read_infer(json.dumps({"inputs": [entry]}).encode(), None)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([{"name": "labels"}], "labels: no such output; there are logits, probabilities"),
        ([{"name": "logits"}, {"name": "logits"}], "asked for twice"),
        ([{"name": "logits", "parameters": {"classification": -3}}], "classification: must be a whole number"),
        ([{"name": "top_labels", "parameters": {"classification": 3}}], "classification goes with logits"),
        ([{"name": "top_labels", "parameters": {"top_k": "3"}}], "top_k: must be a whole number"),
    ],
)
def test_a_wrong_output_is_named(outputs, reason):
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [""]}
    with pytest.raises(Refusal, match=reason):
        read_infer(json.dumps({"inputs": [image], "outputs": outputs}).encode(), None)


@pytest.mark.parametrize("text", [b"{", b"\xff{}", b"[" * 200_000, b'{"inputs": NaN}', b"7", b"null"])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(Refusal, match="JSON"):
        read_infer(text, None)


@given(st.binary(max_size=3000), st.sampled_from(["gzip", "deflate", "gzip;q=0.5, br", "deflate, gzip"]))
def test_what_is_packed_is_unpacked(body, accepted):
    data, encoding = packed(body, accepted)
    assert (encoding != "") == (len(body) >= 1024)
    assert unpacked(data, encoding, 3000) == body


def test_a_bomb_is_defused_after_the_first_bytes():
    bomb = zlib.compress(bytes(50_000_000))
    with pytest.raises(Refusal) as refused:
        unpacked(bomb, "deflate", 1000)
    assert refused.value.status == 413


def test_an_answer_in_raw_bytes_and_in_json():
    logits = np.array([[1.5, -2]], dtype=np.float32)
    labels = np.array([[b"a", "ü".encode()]], dtype=object)
    outputs = [Output("logits", "FP32", logits, True), Output("top_labels", "BYTES", labels, False)]
    body, length = write_infer("m", "1", "", outputs)
    head = json.loads(body[:length])
    assert "id" not in head
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert head["outputs"][1]["data"] == ["a", "ü"]
    assert np.frombuffer(body[length:], "<f4").tolist() == [1.5, -2]
