"""Speed of every stage, one row of the README's table per command; ratios are measured in one run on the same machine.

python tests/benchmark.py train [--model JiT-T/16] [--batch-size 128] [--amp bf16|fp16|off] [--compile] [--checkpointing] [--plain]
python tests/benchmark.py sample [--cfg 2.9] [--steps 50] [--batch-size 128] ...      Heun, against two separate passes in every evaluation
python tests/benchmark.py data --root PHOTOS [--size 256]                             packed rows against decoding
python tests/benchmark.py scores                                                      50,000 x 2,048 features
Utilisation is model FLOPs (forward, and twice that backward) over the rate of a big matrix product in the same process.
--plain: attention written out in fp32, as the official code has it.
"""
import argparse
import sys
import tempfile
import time
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
    size, dtype = (8192 if device.type == "cuda" else 2048), {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    a, b, times = *(torch.randn(size, size, device=device).to(dtype) for _ in range(2)), []
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
    how = f"{'compiled' if args.compile else 'eager'}{', plain attention' if args.plain else ''}{', checkpointing' if args.checkpointing else ''}"
    return f"{args.model} {config.image_size} px, {args.amp}, {how}, batch {args.batch_size} on {name}, torch {torch.__version__}: "

def benchmark_train(args, device):
    config = model.JiTConfig(**model.MODELS[args.model])
    options = train.Options(model=args.model, batch_size=args.batch_size, micro_batch=args.batch_size, lr=1e-4, shift=1.0, warmup=0, steps=10**6, amp=args.amp, compile=args.compile,
                            checkpointing=args.checkpointing, aux_weight=0.0)
    trainer, times = train.Trainer(options, config, device), []
    pair = torch.randint(0, 256, (args.batch_size, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device), torch.zeros(args.batch_size, dtype=torch.long, device=device)
    feed, rate = iter(lambda: pair, None), matmul_rate(device, args.amp)
    while len(times) < 5 or sum(times) < args.seconds and len(times) < 50:
        start = now(device)
        trainer.train_step(feed)
        times += [now(device) - start] if trainer.step > 3 else []
    step = sorted(times)[len(times) // 2]
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(about(args, config, device) + f"{args.batch_size / step:.1f} images/s, {step * 1e3:.1f} ms a step (median of {len(times)}){memory}, matrix product {rate / 1e12:.3f} TFLOP/s, "
          f"utilisation {6 * model.count_macs(config) * args.batch_size / step / rate * 100:.1f} %")

def two_passes(net, z, t, labels, cfg, interval, to, t_eps):
    """The plain way: always both passes, one after the other."""
    low, high = interval
    w = cfg if t < high - 1e-6 and (low == 0 or t > low + 1e-6) else 1.0
    v, null = (sample.predict(net, z, t, y, to, t_eps) for y in (labels, torch.full_like(labels, net.config.num_classes)))
    return null + w * (v - null)

def benchmark_sample(args, device):
    config = model.JiTConfig(**model.MODELS[args.model])
    settings = {"solver": "heun", "steps": args.steps, "cfg": args.cfg, "interval": (0.1, 1.0) if args.cfg != 1 else (0.0, 1.0)}
    sampler = sample.Sampler(model.JiT(config).eval(), list(range(10)), 0, settings, args.amp, device, args.compile)
    one_batch, seconds, calls, rate = sample.guided, {}, [], matmul_rate(device, args.amp)
    for round, (name, guide) in enumerate([("warm-up", one_batch), *[("one batch", one_batch), ("two passes", two_passes)] * 2]):
        sample.guided, settings["steps"] = guide, 2 if not round else args.steps
        hook = sampler.net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0]))) if round == 1 else None
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
    files = data.list_images(args.root)[:200]
    start = time.perf_counter()
    rows = [data.decode((file, args.size)) for file in files]
    decoding = len(files) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", np.stack([row for row in rows if not isinstance(row, str)] * 20))
        images, count, order = np.load(f"{folder}/x.npy", mmap_mode="r"), 0, np.random.default_rng(0)
        start = time.perf_counter()
        while time.perf_counter() - start < args.seconds / 5:
            count += len(images[np.sort(order.integers(0, len(images), 64))])
        packed = count / (time.perf_counter() - start)
    print(f"{args.size} px, one core: decoding {decoding:.0f} images/s, packed rows {packed:.0f} images/s, {packed / decoding:.0f} times as fast")

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
    parser.add_argument("what", choices=("train", "sample", "data", "scores"))
    for name, kind, default in (("model", str, "JiT-T/16"), ("batch-size", int, 128), ("steps", int, 50), ("cfg", float, 1.0), ("root", str, None), ("size", int, 256), ("count", int, 50_000), ("seconds", float, 10.0),
                                ("device", str, None)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"))
    for name in ("compile", "checkpointing", "plain"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args(argv)
    with model.device_and_processes(args.device) as (device, _, _):
        args.amp = model.choose_precision(args.amp, device)
        model.attend = plain_attention if args.plain else FUSED
        {"train": lambda: benchmark_train(args, device), "sample": lambda: benchmark_sample(args, device), "data": lambda: benchmark_data(args), "scores": lambda: benchmark_scores(args.count)}[args.what]()

if __name__ == "__main__":
    main()
