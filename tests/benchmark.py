"""Speed of every stage, one row of the README's table per command; ratios are measured in one run on the same machine.

python tests/benchmark.py train [--model JiT-T/16] [--batch-size 128] [--amp bf16|fp16|off] [--compile] [--record] [--checkpointing] [--plain]
python tests/benchmark.py profile ...                                                 as train: the time of a step by kind of work
python tests/benchmark.py sample [--cfg 2.9] [--steps 50] [--batch-size 128] ...      Heun, against two separate passes in every evaluation
python tests/benchmark.py data --root PHOTOS [--size 256]                             packed rows against decoding
python tests/benchmark.py files [--size 256] [--count 400]                            noise, writing, reading: all cores against one
python tests/benchmark.py scores                                                      50,000 x 2,048 features
Utilisation is model FLOPs (forward, and twice that backward) over the rate of a big matrix product in the same process.
--plain: attention written out in fp32, as the official code has it.  train compares with that, neither compiled nor recorded.
"""
import argparse
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data, model, train, sample, evaluate = (import_module(name) for name in ("01_data", "02_model", "03_train", "04_sample", "05_eval"))

def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

def matmul_rate(device, amp):
    """FLOP/s of a big matrix product on random numbers."""
    size = 8192 if device.type == "cuda" else 256 if amp == "fp16" else 2048            # many a CPU takes minutes for 2048 in fp16
    dtype, times = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp], []
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(8):
        start = now(device)
        a @ b
        times.append(now(device) - start)
    return 2 * size**3 / sorted(times[2:])[2]

FUSED = model.attend

def plain_attention(q, k, v):
    if q.is_meta:                                         # multiply-adds are being counted
        return FUSED(q, k, v)
    with torch.autocast(q.device.type, torch.bfloat16, enabled=False):
        return ((q.float() * q.shape[-1]**-0.5 @ k.float().transpose(-1, -2)).softmax(-1) @ v.float()).to(v.dtype)

def about(args, config, device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    how = [word for word, on in (("compiled", args.compile), ("CUDA graphs", args.record), ("plain attention", args.plain), ("checkpointing", args.checkpointing)) if on]
    return f"{args.model} {config.image_size} px, {args.amp}, {', '.join(how) or 'eager'}, batch {args.batch_size} on {name}, torch {torch.__version__}: "

def make_trainer(args, device, **changed):
    """(trainer after its first steps, feed)."""
    args = argparse.Namespace(**vars(args) | changed)
    model.attend = plain_attention if args.plain else FUSED
    config = model.JiTConfig(**model.MODELS[args.model])
    options = train.Options(model=args.model, batch_size=args.batch_size, micro_batch=args.batch_size, lr=1e-4, shift=1.0, warmup=0, steps=10**6, amp=args.amp, compile=args.compile,
                            record=args.record, checkpointing=args.checkpointing, aux_weight=0.0)
    trainer = train.Trainer(options, config, device)
    pair = torch.randint(0, 256, (args.batch_size, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device), torch.zeros(args.batch_size, dtype=torch.long, device=device)
    feed = iter(lambda: pair, None)
    for _ in range(3):
        trainer.train_step(feed)
    return trainer, feed

def seconds_a_step(trainer, feed, seconds, device):
    """Mean of many steps: they are counted together, since a step that is waited for is another one."""
    count, start = 0, now(device)
    while count < 5 or time.perf_counter() - start < seconds and count < 400:
        for _ in range(5):
            trainer.train_step(feed)
        count += 5
    return (now(device) - start) / count

def benchmark_train(args, device):
    trainer, feed = make_trainer(args, device)
    rate = matmul_rate(device, args.amp)
    step, config = seconds_a_step(trainer, feed, args.seconds, device), trainer.config
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    utilisation = 6 * model.count_macs(config) * args.batch_size / step / rate
    print(about(args, config, device) + f"{args.batch_size / step:.1f} images/s, {step * 1e3:.1f} ms a step{memory}, matrix product {rate / 1e12:.3f} TFLOP/s, utilisation {utilisation * 100:.1f} %")
    if args.compile or args.record:
        plain = seconds_a_step(*make_trainer(args, device, compile=False, record=False, plain=True), args.seconds, device)
        print(f"{plain / step:.2f} times as fast as eager with attention written out, {args.batch_size / plain:.1f} images/s")

KINDS = {"matrix products": r"nvjet|gemm|cutlass|aten::(mm|addmm|bmm|convolution|mkldnn_convolution)", "attention": r"sdpa|flash|fmha|softmax|attention", "FFN": r"silu|gelu",
         "optimizer and averages": r"multi_tensor|foreach|fused_adam|lerp", "rotary embedding and norms": r"rsqrt|flip|complex|view_as|mean|norm", "rest": r""}

def benchmark_profile(args, device):
    """Names of kernels say what they do, more or less; what a compiled kernel does is the first kind that its name fits."""
    trainer, feed = make_trainer(args, device)
    step, cuda = seconds_a_step(trainer, feed, args.seconds, device), device.type == "cuda"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            trainer.train_step(feed)
        now(device)
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.key))
        spent[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 3e6
    spent["waiting"] = max(0.0, step - sum(spent.values()))
    print(about(args, trainer.config, device) + f"{step * 1e3:.1f} ms a step; " + ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in spent.items()))

def two_passes(net, z, t, labels, cfg, interval, to, t_eps):
    """The plain way: always both passes, one after the other."""
    low, high = interval
    w = cfg if t < high - 1e-6 and (low == 0 or t > low + 1e-6) else 1.0
    v, null = (sample.predict(net, z, t, y, to, t_eps) for y in (labels, torch.full_like(labels, net.config.num_classes)))
    return null + w * (v - null)

def benchmark_sample(args, device):
    config = model.JiTConfig(**model.MODELS[args.model])
    settings = {"solver": "heun", "steps": args.steps, "cfg": args.cfg, "interval": (0.1, 1.0) if args.cfg != 1 else (0.0, 1.0)}
    net = model.JiT(config).eval()
    sampler = sample.Sampler(torch.compile(net) if args.compile else net, list(range(10)), 0, settings, args.amp, device)
    one_batch, seconds, calls = sample.guided, {}, []
    settings["steps"] = 2                                 # warm-up
    sampler.images(range(args.batch_size))
    settings["steps"], rate = args.steps, matmul_rate(device, args.amp)
    for round, (name, guide) in enumerate([("one batch", one_batch), ("two passes", two_passes)] * 2):
        sample.guided = guide
        hook = sampler.net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0]))) if not round else None
        start = now(device)
        sampler.images(range(args.batch_size))
        seconds[name] = min(seconds.get(name, 1e9), now(device) - start)
        if hook:
            hook.remove()
    sample.guided = one_batch
    print(about(args, config, device) + f"Heun {args.steps}, w {args.cfg:g} in {settings['interval']}: {args.batch_size / seconds['one batch']:.2f} images/s, {sum(calls) / args.batch_size:.0f} evaluations an image, "
          f"utilisation {sum(calls) * 2 * model.count_macs(config) / seconds['one batch'] / rate * 100:.1f} %, {seconds['two passes'] / seconds['one batch']:.2f} times as fast as two passes")

def benchmark_data(args):
    """Images a second and core: decoding and cropping the originals, random rows of the packed file."""
    files = data.list_images(Path(args.root))[:200]
    start = time.perf_counter()
    rows = [data.decode(file, args.size) for file in files]
    decoding = len(files) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", np.stack([row for row in rows if not isinstance(row, str)] * 20))
        images, count, order = np.load(f"{folder}/x.npy", mmap_mode="r"), 0, np.random.default_rng(0)
        start = time.perf_counter()
        while time.perf_counter() - start < args.seconds / 5:
            count += len(images[np.sort(order.integers(0, len(images), 64))])
        packed = count / (time.perf_counter() - start)
    print(f"{args.size} px, one core: decoding {decoding:.0f} images/s, packed rows {packed:.0f} images/s, {packed / decoding:.0f} times as fast")

def benchmark_files(args):
    """What 04 and 05 do with every image besides the network's work."""
    count, shape, speed = min(args.count, 2000), (3, args.size, args.size), {}
    real = sample.THREADS, sample.ThreadPoolExecutor, os.cpu_count
    for cores in (1, os.cpu_count()):
        sample.THREADS, sample.ThreadPoolExecutor, evaluate.os.cpu_count = ThreadPoolExecutor(cores), lambda cores=cores: ThreadPoolExecutor(cores), lambda cores=cores: cores
        net = lambda batch: {"features": batch[:, :2, 0, 0].float(), "logits": torch.zeros(len(batch), 2)}
        with tempfile.TemporaryDirectory() as folder:
            noise = sample.noise_for(range(count), shape, 0, 1.0)
            sampler = type("Sampler", (), {"labels": [0] * count, "images": lambda self, batch: noise[batch.start:batch.stop], "pictures": lambda self, x: model.to_pictures(x)})()
            for name, work in (("noise", lambda: sample.noise_for(range(count), shape, 0, 1.0)), ("writing", lambda: sample.sample_all(sampler, Path(folder), 100, 0, 1)),
                               ("reading", lambda: evaluate.describe(evaluate.ImageFiles(data.list_images(Path(folder))), net, "cpu", 100, "reading"))):
                start = time.perf_counter()
                work()
                speed[name, cores] = count / (time.perf_counter() - start)
    sample.THREADS, sample.ThreadPoolExecutor, evaluate.os.cpu_count = real
    cores = os.cpu_count()
    print(f"{count} images of {args.size} px, images/s on one core and on {cores}: " + ", ".join(f"{name} {speed[name, 1]:.0f} and {speed[name, cores]:.0f}" for name in ("noise", "writing", "reading")))

def benchmark_scores(n):
    d = 2048 if n > 5000 else 64
    x, real = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32), {}
    net = lambda rows: {"features": torch.from_numpy(x[rows]), "logits": torch.zeros(len(rows), 2)}
    for name, work in ((f"moments of {n} x {d} features", lambda: real.update(evaluate.describe(np.arange(n), net, "cpu", 100, ""))),
                       ("Frechet distance", lambda: evaluate.frechet_distance(real["mu"], real["sigma"], real["mu"] + 1, real["sigma"])),
                       (f"precision, {n // 5} x {n // 5}", lambda: evaluate.share_inside(x[:n // 5], x[n // 5:2 * n // 5]))):
        start = time.perf_counter()
        work()
        print(f"{name}: {time.perf_counter() - start:.1f} s")

def main(argv=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", choices=("train", "profile", "sample", "data", "files", "scores"))
    for name, kind, default in (("model", str, "JiT-T/16"), ("batch-size", int, 128), ("steps", int, 50), ("cfg", float, 1.0), ("root", str, None), ("size", int, 256), ("count", int, None), ("seconds", float, 10.0),
                                ("device", str, None)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"))
    for name in ("compile", "record", "checkpointing", "plain"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args(argv)
    args.count = args.count or {"scores": 50_000}.get(args.what, 400)
    with model.device_and_processes(args.device) as (device, _, _):
        data.refuse(args.record and device.type != "cuda", "--record: CUDA graphs need a GPU")
        args.amp = model.choose_precision(args.amp, device)
        model.attend = plain_attention if args.plain else FUSED
        {"train": lambda: benchmark_train(args, device), "profile": lambda: benchmark_profile(args, device), "sample": lambda: benchmark_sample(args, device), "data": lambda: benchmark_data(args),
         "files": lambda: benchmark_files(args), "scores": lambda: benchmark_scores(args.count)}[args.what]()

if __name__ == "__main__":
    sys.exit(data.run(main))
