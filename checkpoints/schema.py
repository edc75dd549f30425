"""Is a checkpoint file what it says? Looked at before anything in it is believed; see `utils.load_checkpoint`."""

import zipfile

import torch


class Suspicious(Exception):
    """What is wrong with a file, in words that go on after its name."""


def check_archive(path):
    """Refuse a zip archive that is damaged, or whose parts are larger than itself: compressed, or several in one place.

    torch.load compares no checksums, so that a byte which a disk lost would go unnoticed into the weights.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # the older format of torch, which checks its sizes while it reads
            return
    with zipfile.ZipFile(path) as archive:
        parts = sum(part.file_size for part in archive.infolist())
        if parts > path.stat().st_size:
            raise Suspicious(f"unpacks to {parts / 2**20:.0f} MiB, more than it has; torch.save does not compress")
        if archive.testzip() is not None:
            raise Suspicious("is damaged: a checksum is wrong; give another file")


def plain(checkpoint, size_of_file):
    """What a file held, as dictionaries, lists and tuples that are no more than that, and whole tensors.

    Without any code a file may still say that a tensor is one number 10^12 times, that a list contains itself, or that
    the method `get` of a dictionary is 3.
    """
    values, size, most = 0, 0, 10 * size_of_file  # some tensors may have several names

    def unpacked(value):
        nonlocal values, size
        values += 1
        if isinstance(value, torch.Tensor):
            value = torch.Tensor.detach(value)  # without attributes
            if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or value.is_nested:
                raise Suspicious("holds tensors without plain values (meta, sparse or quantized); save others")
            size += value.nbytes
        if values > 2**20 or size > most:
            raise Suspicious("unpacks to far more than it has bytes; give a file that torch.save wrote")
        if isinstance(value, dict):
            return {key: unpacked(item) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            return (list if isinstance(value, list) else tuple)(map(unpacked, value))
        return value

    return unpacked(checkpoint)


def layout(checkpoint: dict):
    """(name of a part, whether it is as `save_checkpoint` is given it) of a checkpoint that describes its model.

    In an order in which each may rely on those before it. Only "model" and "model_args" have to be there.
    """

    def whole(value, low=0, high=2**40):
        return type(value) is int and low <= value <= high

    def real(value, above=-(2**40)):
        return type(value) in (int, float) and above < value < 2**40  # not NaN

    def several(value, kind, count=None):
        return isinstance(value, list | tuple) and count in (None, len(value)) and all(map(kind, value))

    def text(value):
        return type(value) is str

    def weights(value):
        return isinstance(value, dict) and all(map(text, value)) and all(map(torch.is_tensor, value.values()))

    def simple(value):
        return value is None or type(value) is bool or text(value) or real(value) or several(value, whole, 2)

    model_args = checkpoint["model_args"]
    yield "model", weights(checkpoint.get("model"))
    yield "model_args", isinstance(model_args, dict) and all(map(simple, model_args.values()))
    if "data" in checkpoint:
        data = checkpoint["data"]
        yield "data", isinstance(data, dict)
        yield "data.name", text(data.get("name")) and data["name"].isalnum()  # it is put into names of files
        yield "data.classes", several(data.get("classes"), text)
        if "images" in data:
            yield "data.images", isinstance(data["images"], dict) and all(map(whole, data["images"].values()))
        yield "data.classes", len(data["classes"]) == model_args.get("num_classes")
        yield "data.input_size", several(data.get("input_size"), lambda side: whole(side, 1, 2**14), 2)
        yield "data.input_size", model_args.get("img_size", data["input_size"]) == data["input_size"]
        yield "data.mean", several(data.get("mean"), real, 3)
        yield "data.std", several(data.get("std"), lambda value: real(value, above=0), 3)
        if "test_folder" in data:
            yield "data.test_folder", data["test_folder"] in ("test", "val")
        if {"test_size", "test_files"} & data.keys():
            yield "data.test_size", real(data.get("test_size"), above=0)
            yield "data.test_files", text(data.get("test_files"))
        if {"crop_pct", "interpolation"} & data.keys():
            yield "data.crop_pct", real(data.get("crop_pct"), above=0) and data["crop_pct"] <= 1
            yield "data.interpolation", data.get("interpolation") in ("bicubic", "bilinear", "lanczos")
    if "args" in checkpoint:
        args = checkpoint["args"]
        yield "args", isinstance(args, dict)
        yield "args.epochs", whole(args.get("epochs"))
        yield "args.data_path", args.get("data_path") is None or text(args["data_path"])
    yield "epoch", whole(checkpoint.get("epoch", 0))
    yield "metrics", checkpoint.get("metrics") is None or isinstance(checkpoint["metrics"], dict)
    if checkpoint.get("ema") is not None:
        yield "ema", weights(checkpoint["ema"])
        shapes = [{name: t.shape for name, t in checkpoint[part].items()} for part in ("model", "ema")]
        yield "ema", shapes[0] == shapes[1]
