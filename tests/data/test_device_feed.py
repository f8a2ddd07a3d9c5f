"""`decode: device` against the workers' path: the same crops, flips and operations for each sample, the same promises.

Everything here runs on CPU tensors; on CUDA only the decoder and the streams are others.
"""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from visformer.config import TrainConfig
from visformer.data import ArraySource, FolderSource, ImageError, make_train_loader
from visformer.data.device_decode import Lane
from visformer.data.device_feed import DeviceFeed
from visformer.data.device_jobs import ByteJob
from visformer.data.encoded import Encoded
from visformer.data.sampler import Item
from visformer.errors import RunError, UsageError

CPU = torch.device("cpu")


def photographs(count: int) -> list[np.ndarray]:
    """Cut-outs of two photographs that come with scikit-learn, of all sizes."""
    rng = np.random.default_rng(0)
    cut = []
    for number in range(count):
        whole = load_sample_images().images[number % 2]
        height, width = int(rng.integers(90, 300)), int(rng.integers(90, 400))
        top, left = int(rng.integers(0, 427 - height)), int(rng.integers(0, 640 - width))
        cut.append(whole[top : top + height, left : left + width])
    return cut


def encoded(pixels: np.ndarray, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **({"quality": 95, "subsampling": 0} | options))
    return file.getvalue()


class Files:
    """Image files in memory."""

    class_names = ("a", "b", "c")

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def raw(self, index: int) -> bytes:
        return self.files[index]

    def load(self, index: int):
        raise AssertionError("training reads bytes")

    def target(self, index: int) -> int:
        return index % 3

    def name(self, index: int) -> str:
        return f"image{index}"

    key = name


@pytest.fixture(scope="module")
def photos() -> Files:
    return Files([encoded(pixels) for pixels in photographs(40)])


@pytest.fixture
def whole(monkeypatch):
    """The workers decode at full size too, as nvJPEG does, so that the paths can be held against one another."""
    monkeypatch.setattr(Encoded, "reduction", lambda *_: 1)


def config(**options) -> TrainConfig:
    return TrainConfig(
        **{"image_resize": 48, "batch_size": 8, "num_parallel_workers": 0, "seed": 3, "scale": (0.3, 1.0)} | options
    )


def epoch_of(source, number: int = 0, start: int = 0, *, rank: int = 0, world_size: int = 1, **options):
    loader = make_train_loader(source, config(**options), rank=rank, world_size=world_size)
    try:
        loader.set_epoch(number, start)
        return list(loader)
    finally:
        loader.close()


def pixels_of(batches) -> np.ndarray:
    return torch.cat([batch.images for batch in batches]).numpy().astype(np.int16)


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and (a.indices, a.failures) == (b.indices, b.failures)
        for a, b in zip(first, second, strict=True)
    )


# ---- the same samples


POLICIES = [
    None, "none", "autoaug", "autoaugr-mstd0.5", "v0", "3a", "randaug-m9-n2-mstd0.5-inc1", "rand-m7-n3-mstdinf-w0",
    "rand-m9-t3a", "augmix-m5-w3", "augmix-m5-w3-d2-b1", "trivialaugwide",
]  # fmt: skip


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", POLICIES)
def test_each_sample_gets_what_the_workers_give_it(whole, photos, policy, interpolation):
    options = {"auto_augment": policy, "interpolation": interpolation, "vflip": 0.3, "shuffle": False}
    theirs, ours = (epoch_of(photos, decode=decode, **options) for decode in ("workers", "device"))
    assert [b.indices for b in ours] == [b.indices for b in theirs]
    assert [b.targets.tolist() for b in ours] == [b.targets.tolist() for b in theirs]
    difference = np.abs(pixels_of(ours) - pixels_of(theirs)).mean((1, 2, 3))
    assert np.median(difference) < 0.1
    # The workers' AugMix and TrivialAugment move pixels with Pillow, whose bicubic kernel is sharper than torch's.
    assert difference.max() < (4 if policy and policy.startswith(("augmix", "trivial")) else 0.3)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (1, "RGB"), (4, "RGB"), (3, "L")])
def test_channels(whole, channels, mode):
    files = [np.asarray(Image.fromarray(pixels).convert(mode)) for pixels in photographs(8)]
    source = Files([encoded(pixels, **({} if mode == "RGB" else {"subsampling": -1})) for pixels in files])
    theirs, ours = (epoch_of(source, decode=decode, in_channels=channels) for decode in ("workers", "device"))
    assert ours[0].images.shape == (8, channels, 48, 48)
    assert np.abs(pixels_of(ours) - pixels_of(theirs)).mean() < 0.05


def test_splits_begin_with_the_clean_ones(whole, photos):
    options = {"aug_splits": 3, "auto_augment": "rand-m9-mstd0.5"}
    theirs, ours = (epoch_of(photos, decode=decode, **options)[0].images for decode in ("workers", "device"))
    assert ours.shape == theirs.shape == (24, 3, 48, 48)
    difference = (ours.int() - theirs.int()).abs().float().mean((1, 2, 3))
    assert difference[:8].max() < 0.1 and difference.max() < 0.3
    assert not torch.equal(ours[8:16], ours[16:])


FORMATS = {
    "baseline": {}, "half the colours": {"subsampling": 2}, "progressive": {"progressive": True},
    "PNG": {"format": "PNG"}, "WebP": {"format": "WEBP", "lossless": True}, "restarts": {"restart_marker_rows": 1},
}  # fmt: skip


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_formats(whole, options):
    source = Files([encoded(pixels, **options) for pixels in photographs(8)])
    theirs, ours = (epoch_of(source, decode=decode, color_jitter=None) for decode in ("workers", "device"))
    assert np.abs(pixels_of(ours) - pixels_of(theirs)).mean() < 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(whole, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Files([encoded(pixels, exif=exif.tobytes()) for pixels in photographs(8)])
    job = ByteJob(source, config(), 8)
    _, told = job([Item(0, i, 0) for i in range(8)], np.empty(job.shape, np.uint8), frozenset(), lambda _: None)
    assert all(sample.stored for sample in told.samples)  # nothing for the workers to decode
    theirs, ours = (epoch_of(source, decode=decode, color_jitter=None) for decode in ("workers", "device"))
    assert np.abs(pixels_of(ours) - pixels_of(theirs)).mean() < 0.05


def test_only_common_jpegs_are_left_to_the_device():
    pixels = photographs(1)[0]
    cmyk = np.asarray(Image.fromarray(pixels).convert("CMYK"))
    plain = encoded(pixels)
    assert Encoded(plain).common() == (pixels.shape[1], pixels.shape[0], None)
    for data in (
        encoded(pixels, progressive=True), encoded(pixels, "PNG"), plain[:-300], encoded(pixels, keep_rgb=True),
    ):  # fmt: skip
        assert Encoded(data).common() is None
    file = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(file, "JPEG")
    assert Encoded(file.getvalue()).common() is None
    assert Encoded(plain, channels=4).common() is None


def test_pixels_in_memory_need_no_decoding():
    images = np.stack([pixels[:90, :90] for pixels in photographs(12)])
    source = ArraySource(images, np.arange(12) % 3, ["a", "b", "c"], "test")
    theirs, ours = (epoch_of(source, decode=decode) for decode in ("workers", "device"))
    assert np.abs(pixels_of(ours) - pixels_of(theirs)).max() <= 1


# ---- the same promises


def test_a_run_can_begin_in_the_middle_of_an_epoch(photos):
    options = {"decode": "device", "auto_augment": "rand-m9-mstd0.5"}
    whole = epoch_of(photos, 2, **options)
    assert same(epoch_of(photos, 2, start=3, **options), whole[3:])
    assert not same(epoch_of(photos, 1, **options), whole)


def test_workers_change_nothing(photos, monkeypatch):
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)
    options = {"decode": "device", "auto_augment": "trivialaugwide"}
    alone = epoch_of(photos, **options)
    for count in (1, 2):
        assert same(epoch_of(photos, num_parallel_workers=count, **options), alone)


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_a_thread_ahead_changes_nothing(photos, monkeypatch, ahead):
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)
    options = {"decode": "device", "auto_augment": "rand-m9-mstd0.5", "num_parallel_workers": 1}
    alone = epoch_of(photos, **options)
    feed = DeviceFeed.__init__
    monkeypatch.setattr(DeviceFeed, "__init__", lambda self, c, d: feed(self, c, d, ahead=ahead))
    assert same(epoch_of(photos, **options), alone)
    loader = make_train_loader(photos, config(**options))
    abandoned = iter(loader)
    first = next(abandoned)
    abandoned.close()
    assert same([first], alone[:1]) and same(list(loader), alone)
    loader.close()


def test_draws_leave_the_global_generators_alone(photos):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    epoch_of(photos, decode="device", auto_augment="rand-m9-mstd0.5")
    drawn = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()))


def test_ranks_share_the_global_batch(photos):
    whole = epoch_of(photos, decode="device", batch_size=8)
    parts = [epoch_of(photos, decode="device", batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for batch, *own in zip(whole, *parts, strict=True):
        for rank, part in enumerate(own):
            assert part.indices == batch.indices[rank::2]
            # Neighbours in a batch decide how far a crop is padded, and that how a sum is rounded.
            assert (part.images.int() - batch.images[rank::2].int()).abs().float().mean() < 0.05


def test_what_does_not_fit_into_a_batchs_memory_goes_beside_it(photos, monkeypatch):
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)
    options = {"decode": "device", "num_parallel_workers": 1}
    roomy = epoch_of(photos, **options)
    monkeypatch.setattr("visformer.data.device_jobs._batch_bytes", lambda *_: 20_000)
    assert same(epoch_of(photos, **options), roomy)


def test_large_images_are_decoded_a_few_at_a_time(photos, monkeypatch):
    whole = epoch_of(photos, decode="device")
    monkeypatch.setattr("visformer.data.device_feed.DECODED_AT_ONCE", 50_000)
    monkeypatch.setattr("visformer.data.device_resize.AT_ONCE", 20_000)
    assert np.abs(pixels_of(epoch_of(photos, decode="device")) - pixels_of(whole)).mean() < 0.05


# ---- images that can't be read


def spoilt(data: bytes) -> bytes:
    """Whole to the eye, with a marker in the middle that has no place there."""
    middle = len(data) // 2
    return data[:middle] + b"\xff\xc4\x00\x05abc" + data[middle + 7 :]


class Faulty(Files):
    """Files of which some vanished."""

    def __init__(self, files: list[bytes], gone: set[int]) -> None:
        super().__init__(files)
        self.gone = gone

    def raw(self, index: int) -> bytes:
        if index in self.gone:
            raise ImageError("no such file", self.name(index))
        return super().raw(index)


@pytest.mark.parametrize("first", [False, True])
def test_an_image_that_cannot_be_read_is_listed_and_replaced(photos, monkeypatch, first):
    refused = 0 if first else 5
    monkeypatch.setattr("visformer.data.device_decode._by_libjpeg", refusing(photos.files[refused]))
    monkeypatch.setattr("visformer.data.transforms.TrainTransform.placed", broken)
    source = Faulty(photos.files[:8], {1, 3})
    [batch] = epoch_of(source, decode="device", shuffle=False)
    missing = sorted({1, 3, refused})
    reasons = {1: "no such file", 3: "no such file", refused: "damaged (in the middle)"}
    assert batch.failures == [(f"image{i}", reasons[i]) for i in missing]
    stand_in = min(set(range(8)) - set(missing))
    assert batch.indices == [stand_in if i in missing else i for i in range(8)]
    assert batch.targets.tolist() == [index % 3 for index in batch.indices]
    for place in missing:
        assert torch.equal(batch.images[place], batch.images[stand_in])
    assert len({image.numpy().tobytes() for image in batch.images}) == 5


def broken(self, image, placing):
    raise ImageError("damaged (in the middle)")


def refusing(data: bytes):
    """libjpeg, for which one file is too much."""
    from visformer.data.device_decode import _by_libjpeg

    def decode(files, channels):
        return None if any(file.numpy().tobytes() == data for file in files) else _by_libjpeg(files, channels)

    return decode


def test_one_bad_image_costs_a_few_more_calls_and_not_one_for_each_image(photos, monkeypatch):
    calls = []
    refuse = refusing(photos.files[13])
    monkeypatch.setattr(
        "visformer.data.device_decode._by_libjpeg", lambda files, channels: calls.append(0) or refuse(files, channels)
    )
    spared = epoch_of(photos, decode="device", batch_size=32, shuffle=False)
    assert len(calls) <= 11
    monkeypatch.undo()
    alike = (pixels_of(spared) - pixels_of(epoch_of(photos, decode="device", batch_size=32, shuffle=False))).astype(int)
    others = [i for i in range(32) if i != 13]
    assert np.abs(alike[others]).mean() < 0.05 and np.abs(alike[13]).mean() < 3  # the workers' decoders took it


def test_damage_counts_as_it_does_with_the_workers(photos):
    source = Files([spoilt(data) if i == 2 else data for i, data in enumerate(photos.files[:8])])
    theirs, ours = (epoch_of(source, decode=d, shuffle=False, scale=(1.0, 1.0))[0] for d in ("workers", "device"))
    assert (ours.indices, ours.failures) == (theirs.indices, theirs.failures)
    assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 1


def test_an_image_that_ended_two_workers_is_not_read(photos):
    job = ByteJob(photos, config(), 4)
    read = []
    out = np.empty(job.shape, np.uint8)
    _, told = job([Item(0, i, 0) for i in range(4)], out, frozenset({2}), read.append)
    assert told.failures == [(2, "image2", "ended two of the workers that read it")]
    assert [sample.place for sample in told.samples] == [0, 1, 3] and read == [0, 1, 2, 3]


def test_too_many_bad_images_end_the_run(photos):
    with pytest.raises(RunError, match="more than the 1 that max_bad_images allows"):
        epoch_of(Faulty(photos.files, set(range(0, 40, 3))), decode="device", max_bad_images=1)
    with pytest.raises(RunError, match="none of the other images of its batch"):
        epoch_of(Faulty(photos.files, set(range(40))), decode="device", max_bad_images=99)


def test_a_last_batch_may_be_smaller(photos):
    batches = epoch_of(photos, decode="device", batch_size=16, drop_remainder=False)
    assert [len(batch) for batch in batches] == [16, 16, 8] and batches[-1].images.shape[0] == 8


# ---- devices


def test_a_cpu_is_told_that_it_gains_nothing(photos, capsys, monkeypatch):
    monkeypatch.setattr("visformer.console._warned", set())
    make_train_loader(photos, config(decode="device"))
    assert "brings nothing on a CPU" in capsys.readouterr().err


def test_other_devices_are_refused(photos):
    with pytest.raises(UsageError, match="decode: device is for CUDA"):
        make_train_loader(photos, config(decode="device"), device=torch.device("mps"))


def test_cuda_without_a_decoder_is_refused(photos, monkeypatch):
    def missing(*_):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nsecond line")

    monkeypatch.setattr("visformer.data.device_decode._nvjpeg", missing)
    with pytest.raises(UsageError, match=r"can't decode on cuda:0 \(decode_jpegs_cuda: .* support\); use workers"):
        make_train_loader(photos, config(decode="device"), device=torch.device("cuda", 0))


class Stream:
    """Writes down what is asked of it."""

    def __init__(self, name: str, said: list) -> None:
        self.name, self.said = name, said

    def synchronize(self) -> None:
        self.said.append(f"wait for {self.name}")

    def __enter__(self) -> None:
        self.said.append(f"under {self.name}")

    def __exit__(self, *_) -> None:
        self.said.append(f"no longer under {self.name}")


def test_cuda_decodes_under_an_empty_stream_into_memory_that_stays(monkeypatch):
    """nvJPEG does not wait for the stream, so nothing may wait there, and its bytes are used again after the call."""
    said: list = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: said.append(f"kept for {stream.name}"))
    monkeypatch.setattr(
        "visformer.data.device_decode._nvjpeg",
        lambda files, channels, device: said.append("decode") or [torch.zeros(3, 2, 2)] * len(files),
    )
    lane = Lane(torch.device("cpu"))
    lane.stream = Stream("augmenting", said)
    lane.decoding = Stream("decoding", said)
    assert len(lane.decode([torch.zeros(1)] * 2, 3)) == 2
    assert said == [
        "under decoding", "wait for decoding", "decode", "wait for decoding", "no longer under decoding",
        "kept for augmenting", "kept for augmenting",
    ]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_what_workers_do_can_be_sent_to_another_process(photos, policy):
    job = ByteJob(photos, config(auto_augment=policy, interpolation="random"), 4)
    made = []
    for own in (job, pickle.loads(pickle.dumps(job))):
        out = np.zeros(own.shape, np.uint8)
        made.append((own([Item(1, i, 0) for i in range(4)], out, frozenset(), lambda _: None), out.tobytes()))
    assert made[0] == made[1]


# ---- the distribution


def figures(images: np.ndarray) -> np.ndarray:
    """Of each image: mean and deviation of each channel, energy of its gradients, and eight bins of its levels."""
    values = images.astype(np.float64)
    energy = (np.diff(values, axis=2) ** 2).mean((1, 2, 3)) + (np.diff(values, axis=3) ** 2).mean((1, 2, 3))
    bins = [((values >= 32 * i) & (values < 32 * i + 32)).mean((1, 2, 3)) for i in range(8)]
    return np.column_stack([values.mean((2, 3)), values.std((2, 3)), np.sqrt(energy), *bins])


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kolmogorov and Smirnov's, for each figure."""
    both = np.sort(np.concatenate([first, second]), axis=0)
    shares = [
        np.stack([np.searchsorted(np.sort(own[:, i]), both[:, i], side="right") for i in range(own.shape[1])])
        / len(own)
        for own in (first, second)
    ]
    return np.abs(shares[0] - shares[1]).max(1)


@pytest.mark.parametrize("policy", ["autoaug", "randaug-m9-n2-mstd0.5-inc1"])
def test_the_distribution_is_that_of_the_workers(photos, policy):
    """Augmented with other seeds, so that nothing is shared but the distribution: as near as two seeds of one path."""
    options = {"auto_augment": policy, "interpolation": "bicubic", "scale": (0.08, 1.0), "re_prob": 0.0}

    def sample(decode: str, seed: int) -> np.ndarray:
        return figures(np.concatenate([
            pixels_of(epoch_of(photos, epoch, decode=decode, seed=seed, **options)) for epoch in range(8)
        ]))  # fmt: skip

    workers, others, device = sample("workers", 1), sample("workers", 2), sample("device", 3)
    between_seeds, between_paths = distance(workers, others), distance(np.concatenate([workers, others]), device)
    limit = 1.95 * np.sqrt(1 / 640 + 1 / 320)  # crossed by one in a thousand of equal distributions
    assert (between_paths < limit).all(), between_paths
    assert between_paths.mean() < between_seeds.mean() * 1.5
    blurred = device.copy()
    blurred[:, 6] *= 0.8
    assert distance(np.concatenate([workers, others]), blurred)[6] > limit / 2  # the figure tells blurred images apart


def test_a_folder_of_files(tmp_path, photos):
    for number, data in enumerate(photos.files[:12]):
        path = tmp_path / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    [batch] = epoch_of(FolderSource(tmp_path), decode="device", batch_size=12)
    assert batch.images.shape == (12, 3, 48, 48) and sorted(batch.indices) == list(range(12))
