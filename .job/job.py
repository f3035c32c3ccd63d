"""Marginal times of the memory-bound kernels under many parameters. `warm N`: only compile what is N of 8."""
import os, sys, time, subprocess, contextlib, itertools, gc
START = time.time()
sys.path.insert(0, os.getcwd())
import torch
from timing import marginal
import proto, protof, protok, protop, protos
import threading
threading.Timer(60 if len(sys.argv) > 2 else 115, lambda: os._exit(3)).start()
from benchmarks import kernels_mhc as fam
from benchmarks import kernel_timing
from paddledsv4.kernels import compress, hc_contract, hc_mapping, permute, reduction, rms_norm, sinkhorn

LIMIT = 150
WARM = len(sys.argv) > 2
RATE = [4.273e12]
CONFIGS = []  # family, wanted part of the case's name, sizes, label, patches, check


def add(family, want, sizes, label, *patches, check=False):
    CONFIGS.append((family, want, sizes, label, patches, check))


def item(d, **v):
    return lambda: patch_dict(d, v)


def attr(o, **v):
    return lambda: patch_attr(o, v)


@contextlib.contextmanager
def patch_dict(d, v):
    old = dict(d); d.update(v)
    try: yield
    finally: d.clear(); d.update(old)


@contextlib.contextmanager
def patch_attr(o, v):
    old = {k: getattr(o, k) for k in v}
    for k, x in v.items(): setattr(o, k, x)
    try: yield
    finally:
        for k, x in old.items(): setattr(o, k, x)


def contract_b(**kw):
    def f(c, *a): return proto.backward(c, *a, **kw)
    return attr(hc_contract, backward=f)


def contract_f(**kw):
    def f(c, *a): return protof.forward(c, *a, **kw)
    return attr(hc_contract, forward=f)


def row_tile(block, warps):
    return attr(permute, _row_tile=lambda width: {"BLOCK": block, "num_warps": warps})


def norm_tile(rows, warps):
    return attr(rms_norm, _tile=lambda width: {"BLOCK": 4096, "ROWS": rows, "num_warps": warps})


BOTH, BIG = (16384, 4096), (16384,)
# defaults, checked
add("pooling", "compress", BOTH, "default", check=True)
add("experts", "permute", BOTH, "default", check=True)
add("connections", "hc_project", BOTH, "default", check=True)
add("connections", "hc_contract", BOTH, "default", check=True)
add("norms", "rms_norm", BOTH, "default", check=True)
# contraction
add("connections", "hc_contract, {}, b", BOTH, "one kernel chunk 256 lag 1", contract_b(), check=True)
add("connections", "hc_contract, {}, f", BOTH, "one kernel chunk 256 lag 2", contract_f(), check=True)
for kw in (dict(chunk=128), dict(chunk=512), dict(LAG=2), dict(KEEP="evict_last", DROP="evict_first"), dict(DROP="evict_first"),
           dict(STAGES=2), dict(BLOCK=64), dict(each=2), dict(each=8), dict(WIDE=1024), dict(WIDE=4096), dict(BLOCK=256, STAGES=2, warps=8)):
    add("connections", "hc_contract, {}, b", BIG, f"one kernel {kw}", contract_b(**kw))
for kw in (dict(LAG=1), dict(chunk=512), dict(chunk=128), dict(SPLITS=16), dict(each=1), dict(each=4), dict(KEEP="evict_last", DROP="evict_first"),
           dict(TOKENS=128, warps=8), dict(TOKENS=128, BLOCK=64, warps=8, WIDE=4096), dict(BLOCK=64, STAGES=4)):
    add("connections", "hc_contract, {}, f", BIG, f"one kernel {kw}", contract_f(**kw))
for T, B, S, w in ((32, 128, 2, 4), (32, 64, 3, 4), (16, 128, 3, 4), (32, 256, 2, 8)):
    add("connections", "hc_contract, {}, b", BIG, f"tile {T} {B} {S} {w}", item(hc_mapping.HEAD_BACKWARD, TOKENS=T, BLOCK=B, STAGES=S, num_warps=w))
# projection
for T, B, S, w in ((128, 64, 4, 8), (256, 64, 3, 16), (256, 64, 3, 8), (256, 32, 4, 8)):
    add("connections", "hc_project 24 of 4 x 4096, {}, f", BOTH, f"tile {T} {B} {S} {w}", item(hc_mapping.FORWARD, TOKENS=T, BLOCK=B, STAGES=S, num_warps=w))
add("connections", "hc_project 24 of 4 x 4096, {}, f", BOTH, "programs 512", attr(hc_mapping, PROGRAMS=(512, 512)))
for p in (256, 1024):
    add("connections", "hc_project 24 of 4 x 4096, {}, b", BOTH, f"programs {p}", attr(hc_mapping, PROGRAMS=(256, p)))
for T, B, S, w in ((64, 256, 2, 8), (32, 256, 3, 8)):
    add("connections", "hc_project 24 of 4 x 4096, {}, b", BOTH, f"tile {T} {B} {S} {w}", item(hc_mapping.BACKWARD, TOKENS=T, BLOCK=B, STAGES=S, num_warps=w))
for T, B, S, w in ((64, 64, 4, 4), (32, 128, 3, 4)):
    add("connections", "hc_project 24 of 4 x 4096, {}, b", BOTH, f"two terms, tile {T} {B} {S} {w}", attr(hc_mapping, _terms=lambda c, x: 2), item(hc_mapping.BACKWARD, TOKENS=T, BLOCK=B, STAGES=S, num_warps=w))
add("connections", "hc_project 24 of 4 x 4096, {}, b", BOTH, "two terms", attr(hc_mapping, _terms=lambda c, x: 2), check=True)
add("connections", "hc_project 24 of 4 x 4096, {}, b", BOTH, "add 256 rows", attr(reduction, ROWS=256))
add("connections", "hc_project 24 of 4 x 4096, {}, f", BOTH, "last adds", attr(hc_mapping, project=protop.project), check=True)
add("connections", "hc_project 24 of 4 x 4096, {}, f", BOTH, "last adds, 4 stages", attr(hc_mapping, project=protop.project), item(hc_mapping.FORWARD, STAGES=4))
add("connections", "hc_project 24 of 4 x 4096, {}, f", BOTH, "last adds, 256 16 warps", attr(hc_mapping, project=protop.project), item(hc_mapping.FORWARD, TOKENS=256, num_warps=16))
add("connections", "sinkhorn 20, {}, b", BOTH, "default")
add("connections", "sinkhorn 20, {}, b", BOTH, "loops, factors in memory", attr(sinkhorn, backward=protok.backward), check=True)
add("connections", "hc_gates", BOTH, "default")
# pooling
for F, w, S, P in ((4, 4, 1, 396), (4, 4, 3, 396), (4, 4, 2, 792), (4, 4, 1, 792), (2, 4, 2, 528), (2, 4, 3, 528), (2, 4, 2, 1056),
                   (4, 2, 2, 792), (4, 1, 2, 1024), (4, 1, 3, 1024), (4, 1, 1, 1584), (4, 8, 2, 264)):
    add("pooling", "compress by 4, {}, b", BOTH, f"features {F} warps {w} stages {S} programs {P}",
        item(compress.BACKWARD, FEATURES=F, WARPS=w, STAGES=S, PROGRAMS=P))
add("pooling", "compress by 4, {}, b", BOTH, "add 256 rows", attr(reduction, ROWS=256), check=True)
for F, w, S, P in ((8, 4, 1, 16384), (4, 4, 1, 16384), (8, 4, 2, 528), (4, 4, 2, 1056), (4, 1, 1, 65536)):
    add("pooling", "compress by 4, {}, f", BOTH, f"features {F} warps {w} stages {S} programs {P}",
        item(compress.FORWARD, FEATURES=F, WARPS=w, STAGES=S, PROGRAMS=P))
for B, w, S, P in ((32, 4, 1, 256), (32, 4, 2, 512), (32, 8, 2, 256), (32, 8, 3, 256), (32, 4, 3, 396), (64, 8, 2, 256), (32, 8, 1, 512)):
    add("pooling", "compress by 128, {}, b", BOTH, f"block {B} warps {w} stages {S} programs {P}",
        item(compress.LARGE_BACKWARD, BLOCK=B, WARPS=w, STAGES=S, PROGRAMS=P))
for B, w, S, P in ((32, 4, 1, 2048), (32, 4, 2, 528), (32, 2, 2, 528), (16, 1, 1, 4096), (16, 2, 1, 4096), (64, 4, 1, 2048)):
    add("pooling", "compress by 128, {}, f", BOTH, f"block {B} warps {w} stages {S} programs {P}",
        item(compress.LARGE_FORWARD, BLOCK=B, WARPS=w, STAGES=S, PROGRAMS=P))
# permutation
for T, w in ((32, 8), (16, 4), (8, 8)):
    add("experts", "permute top-6 of 256, {}, f", BOTH, f"tokens {T} warps {w}", attr(permute, TOKENS=T, _map_tile=lambda e, T=T, w=w: {"TOKENS": T, "EXPERTS": 256, "num_warps": w}))
for C, B in ((8, 256), (16, 256), (32, 256)):
    add("experts", "permute top-6 of 256, {}, f", BOTH, f"columns {C} blocks {B}", attr(permute, COLUMNS=C, BLOCKS=B))
for B, w in ((4096, 4), (4096, 8), (1024, 2), (2048, 2), (2048, 8)):
    add("experts", "unpermute top-6, {}, ", BIG, f"rows {B} {w}", row_tile(B, w))
for kernel, b, w, h, ca in (("_hinted", 2048, 4, "evict_first", ""), ("_hinted", 2048, 4, "", ".cs"), ("_hinted", 4096, 4, "evict_first", ""),
                            ("_eight", 512, 4, "", ""), ("_eight", 1024, 4, "", ""), ("_eight", 256, 4, "evict_first", "")):
    add("experts", "unpermute top-6, {}, b", BOTH, f"spread {kernel} {b} {w} {h}{ca}", attr(permute, spread=protos.spread(getattr(protos, kernel), b, w, h, ca)), check=True)
# norm
for R, w in ((1, 4), (1, 16), (2, 8)):
    add("norms", "rms_norm 4096, {}, f", BOTH, f"rows {R} warps {w}", norm_tile(R, w))
for P, S, w in ((264, 3, 8), (132, 4, 16), (132, 4, 8), (128, 3, 16)):
    add("norms", "rms_norm 4096, {}, b", BOTH, f"programs {P} stages {S} warps {w}", attr(rms_norm, PROGRAMS=P, STAGES=S), norm_tile(1, w))
add("norms", "rms_norm 4096, {}, b", BOTH, "add 256 rows", attr(reduction, ROWS=256))


def matches(want, name, tokens):
    return name.startswith(want.replace("{}", str(tokens)))


def norms_only(tokens):
    return itertools.islice(fam.norms(tokens), 2)


def main():
    mine = int(sys.argv[2]) if WARM else 0
    order = {}
    for n, c in enumerate(CONFIGS):
        for tokens in c[2]:
            order.setdefault((tokens, c[0]), []).append((n, c))
    if not WARM:
        RATE[0] = kernel_timing.copy_rate(); print(f"copy {RATE[0]/1e9:.0f} GB/s", flush=True)
    for (tokens, family), list_ in order.items():
        torch.manual_seed(0)
        t = tokens
        cases = list(norms_only(t) if family == "norms" else getattr(fam, family)(t))
        for n, (_, want, sizes, label, patches, check) in list_:
            if WARM and n % 8 != mine: continue
            for case in cases:
                if not matches(want, case.name, tokens): continue
                if time.time() - START > LIMIT: print("time is up", flush=True); return
                line = f"{case.name:42} {label:60}"
                try:
                    with contextlib.ExitStack() as stack:
                        for p in patches: stack.enter_context(p())
                        if WARM: case.ours(); torch.cuda.synchronize(); continue
                        error = case.check() if check else None
                        ms = marginal(case.ours, 8, 5)
                    good = "" if error is None else f"error {error:.1e}" + ("" if error <= case.limit else " WRONG")
                    print(f"{line} {1e3*ms:7.1f} us {100*case.work/ms*1e3/RATE[0]:4.0f}% {good}", flush=True)
                except Exception as e:
                    if not WARM: print(line, "FAILED", type(e).__name__, str(e)[:200], flush=True)
        del cases, case; gc.collect(); torch.cuda.empty_cache()


if not WARM:
    # compile in 8 processes first; a wait that never ends would show here, and be killed
    procs = [subprocess.Popen([sys.executable, __file__, "warm", str(i)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(8)]
    for i, p in enumerate(procs):
        try: print("warm", i, p.wait(timeout=max(1, 42 - (time.time() - START))), f"{time.time()-START:.0f} s", flush=True)
        except subprocess.TimeoutExpired: p.kill(); print("warm", i, "killed", flush=True)
    START = time.time(); LIMIT = 58
main()
print(f"{time.time()-START:.0f} s", flush=True)
os._exit(0)
