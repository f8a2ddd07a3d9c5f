"""Run by test_triton.py, with tritonclient: `python triton_calls.py HOST:PORT GIVEN.npz GOT.npz`."""

import sys

import numpy as np
import tritonclient.http as triton

URL, GIVEN, GOT = sys.argv[1:]


def input_of(name: str, array: np.ndarray) -> triton.InferInput:
    kind = {"float32": "FP32", "uint8": "UINT8"}[array.dtype.name]
    given = triton.InferInput(name, list(array.shape), kind)
    given.set_data_from_numpy(array)
    return given


def main() -> None:
    arrays = np.load(GIVEN)
    client = triton.InferenceServerClient(URL, concurrency=16)
    images = input_of("images", arrays["images"])
    batch = client.infer("pets", [images]).as_numpy("logits")
    asked = [triton.InferRequestedOutput("logits", class_count=1)]
    classes = client.infer("pets", [images], outputs=asked).as_numpy("logits")
    image = client.infer("pets_image", [input_of("image", arrays["image"])]).as_numpy("logits")
    single = input_of("images", arrays["images"][:1])
    for request in [client.async_infer("pets", [single]) for _ in range(26)]:
        np.testing.assert_allclose(request.get_result().as_numpy("logits"), batch[:1], atol=1e-4)
    (statistics,) = client.get_inference_statistics("pets")["model_stats"]
    sizes = {one["batch_size"]: one["compute_infer"]["count"] for one in statistics["batch_stats"]}
    batches = [size for size, count in sizes.items() for _ in range(count)]
    np.savez(GOT, batch=batch, classes=classes.astype("S"), image=image, batches=batches)


if __name__ == "__main__":
    main()
