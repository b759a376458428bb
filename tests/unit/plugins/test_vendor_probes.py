"""Probes on made-up machines: fake sysfs and /dev trees, and stand-ins for the management libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from attn_core import Device, probing
from attn_plugin_ascend import probe as ascend
from attn_plugin_cuda import probe as cuda
from attn_plugin_intel import probe as intel
from attn_plugin_musa import probe as musa
from attn_plugin_rocm import probe as rocm

PROBES = {"cuda": cuda, "musa": musa, "rocm": rocm, "ascend": ascend, "intel": intel}


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def archs(devices: tuple[Device, ...]) -> list[str]:
    return [d.arch for d in devices]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No management library or tool, whatever this machine has: a None in sys.modules is an ImportError."""
    for name in ("pynvml", "pymtml"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", "")


def vendor_tool(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A vendor's command-line tool, first and alone on the path."""
    (root / "bin").mkdir(exist_ok=True)
    file = root / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(root / "bin"))


def shut(monkeypatch: pytest.MonkeyPatch, *nodes: Path) -> None:
    """This user may not open these device nodes (tests often run as root, who may)."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in nodes)


@pytest.mark.parametrize("name", PROBES)
def test_a_machine_without_the_hardware_has_no_devices(name: str, tmp_path: Path) -> None:
    assert PROBES[name].probe(tmp_path, {}) == ()


# ---- cuda ------------------------------------------------------------------------------------------------------------


class Nvml(ModuleType):
    """NVML's bindings as far as the probe uses them. GPUs are (uuid, capability, name, memory)."""

    def __init__(self, *gpus: tuple[str, tuple[int, int], str, int | None]) -> None:
        super().__init__("pynvml")
        self.gpus, self.depth = gpus, 0

    def nvmlInit(self) -> None:
        self.depth += 1

    def nvmlShutdown(self) -> None:
        self.depth -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
        return i

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "MIG-7":
            raise RuntimeError("no such MIG instance")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:
        return 1

    def nvmlDeviceGetUUID(self, h: int) -> str:
        return self.gpus[h][0]

    def nvmlDeviceGetCudaComputeCapability(self, h: int) -> tuple[int, int]:
        return self.gpus[h][1]

    def nvmlDeviceGetName(self, h: int) -> bytes:
        return self.gpus[h][2].encode()  # old bindings answer bytes

    def nvmlDeviceGetMemoryInfo(self, h: int) -> SimpleNamespace:
        memory = self.gpus[h][3]
        if memory is None:
            raise RuntimeError("Not Supported")
        return SimpleNamespace(total=memory)

    def nvmlDeviceGetPciInfo(self, h: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{h + 1:02X}:00.0")


H200 = ("GPU-aa11", (9, 0), "NVIDIA H200", 150 << 30)
RTX = ("GPU-bb22", (12, 0), "NVIDIA GeForce RTX 5090", 32 << 30)
GB10 = ("GPU-cc33", (12, 1), "NVIDIA GB10", None)


def test_cuda_through_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = Nvml(H200, RTX, GB10)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = cuda.probe(tmp_path, {})
    assert archs(found) == ["sm_90", "sm_120", "sm_121"]
    assert [d.index for d in found] == [0, 1, 2]
    assert "wgmma" in found[0].isa
    assert "tcgen05" not in found[1].isa
    assert [d.total_memory for d in found] == [150 << 30, 32 << 30, None]
    assert found[1].name == "NVIDIA GeForce RTX 5090"
    assert found[1].bus_id == "00000000:02:00.0"
    assert found[0].versions["driver"] == "580.65.06"
    assert nvml.depth == 0, "NVML is shut down again"


def test_cuda_chip_the_table_lacks_has_no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(("GPU-1", (13, 0), "NVIDIA Later", 1)))
    (found,) = cuda.probe(tmp_path, {})
    assert (found.arch, found.isa, found.shared_memory_per_block) == ("sm_130", frozenset(), None)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["sm_90", "sm_120", "sm_121"]),
        ("", []),
        ("2,0", ["sm_121", "sm_90"]),
        ("1,7,0", ["sm_120"]),
        ("0,-1,1", ["sm_90"]),
        ("GPU-bb", ["sm_120"]),
        ("MIG-7", ["sm_120"]),
    ],
)
def test_cuda_visible_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(H200, RTX, GB10))
    found = cuda.probe(tmp_path, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert archs(found) == expected
    assert [d.index for d in found] == list(range(len(expected)))


def proc(*models: str) -> dict[str, str]:
    gpus = {
        f"proc/driver/nvidia/gpus/0000:{i + 1:02x}:00.0/information": f"Model: \t\t {m}\nGPU UUID: \t GPU-{i}\nIRQ: 1\n"
        for i, m in enumerate(models)
    }
    return {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n", **gpus}


def test_cuda_without_nvml_reads_names_from_proc(tmp_path: Path) -> None:
    found = cuda.probe(tree(tmp_path, proc("NVIDIA H100 80GB HBM3", "Tesla T4")), {"CUDA_VISIBLE_DEVICES": "1,0"})
    assert archs(found) == ["sm_75", "sm_90"]
    assert found[0].versions["driver"] == "580.65.06"
    assert found[1].bus_id == "0000:01:00.0"
    assert found[1].total_memory is None


def test_cuda_does_not_guess_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="nvidia-ml-py"):
        cuda.probe(tree(tmp_path, proc("NVIDIA H100 PCIe", "NVIDIA Riva TNT2")), {})
    assert archs(cuda.probe(tmp_path, {"CUDA_VISIBLE_DEVICES": "0"})) == ["sm_90"]
    with pytest.raises(LookupError, match="MIG-7"):
        cuda.probe(tmp_path, {"CUDA_VISIBLE_DEVICES": "MIG-7"})


@pytest.mark.parametrize(
    ("name", "arch"),
    [("NVIDIA GeForce RTX 5090", "sm_120"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120"),
     ("NVIDIA A100-SXM4-80GB", "sm_80"), ("NVIDIA A10G", "sm_86"), ("NVIDIA L40S", "sm_89"), ("NVIDIA L4", "sm_89"),
     ("NVIDIA GB200", "sm_100"), ("NVIDIA GB10", "sm_121"), ("NVIDIA GH200 480GB", "sm_90"),
     ("NVIDIA RTX 6000 Ada Generation", None), ("NVIDIA A1000", None), ("", None)],
)  # fmt: skip
def test_cuda_product_names(name: str, arch: str | None) -> None:
    assert cuda.arch_of(name) == arch


def test_broken_nvml_is_like_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))  # a stranger of that name
    assert cuda.probe(tmp_path, {}) == ()


class NVMLError(Exception):
    """As the bindings raise it: with the number of nvmlReturn_t."""

    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


@pytest.mark.parametrize("value", [9, 12])
def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: int) -> None:
    nvml = Nvml()
    monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(NVMLError(value, "none")), raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert cuda.probe(tmp_path, {}) == ()


def test_a_driver_that_does_not_work_is_no_machine_without_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvml = Nvml(H200)
    error = NVMLError(18, "Driver/library version mismatch")
    monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(error), raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.raises(LookupError, match="version mismatch"):
        cuda.probe(tree(tmp_path, proc("NVIDIA H100 PCIe")), {})


def test_nodes_of_a_driver_that_answers_nobody(tmp_path: Path) -> None:
    tree(tmp_path, {"dev/nvidia0": "", "dev/nvidiactl": ""})
    with pytest.raises(LookupError, match="device nodes"):
        cuda.probe(tmp_path, {})
    assert cuda.probe(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_toolkit_is_read_from_the_version_file_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for build, expected in (("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None)):
        package = tmp_path / str(expected)
        tree(
            package,
            {"torch/__init__.py": "raise RuntimeError('imported')", "torch/version.py": f"{build}\nhip = '7.1'"},
        )
        monkeypatch.setattr(sys, "path", [str(package)])
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        assert probing.torch_build("cuda") == expected
        assert probing.torch_build("hip") == "7.1"


# ---- musa ------------------------------------------------------------------------------------------------------------


class Mtml(Nvml):
    def nvmlDeviceGetCudaComputeCapability(self, h: int) -> tuple[int, int]:
        raise AssertionError("that call imports torch_musa")


def pci(address: str, vendor: str, device: str, kind: str) -> dict[str, str]:
    base = f"sys/bus/pci/devices/{address}"
    return {f"{base}/vendor": f"{vendor}\n", f"{base}/device": f"{device}\n", f"{base}/class": f"{kind}\n"}


def test_musa_through_mtml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mtml = Mtml(("GPU-1", (0, 0), "MTT S5000", 80 << 30), ("GPU-2", (0, 0), "MTT S4000", 48 << 30))
    monkeypatch.setitem(sys.modules, "pymtml", mtml)
    tree(tmp_path, {"dev/mtgpu.0": "", "dev/mtgpu.1": ""})
    found = musa.probe(tmp_path, {})
    assert archs(found) == ["mp31", "mp22"]
    assert found[0].isa == {"tme"}
    assert found[0].total_memory == 80 << 30
    assert found[0].versions == {"musa": ""}, "present, version unknown"
    assert archs(musa.probe(tmp_path, {"MUSA_VISIBLE_DEVICES": "1"})) == ["mp22"]
    assert mtml.depth == 0


def test_musa_from_pci_numbers(tmp_path: Path) -> None:
    tree(tmp_path, {"dev/mtgpu.0": ""})
    tree(tmp_path, pci("0000:2a:00.0", "0x1ed5", "0x0323", "0x030200"))
    tree(tmp_path, pci("0000:2a:00.1", "0x1ed5", "0x03ff", "0x040300"))  # its audio function
    tree(tmp_path, pci("0000:2b:00.0", "0x10de", "0x0323", "0x030200"))  # another vendor's
    (found,) = musa.probe(tmp_path, {})
    assert (found.arch, found.name, found.bus_id) == ("mp22", "MTT S4000", "0000:2a:00.0")


# As mthreads-gmi -q prints it; other sections left out.
GMI = """
==================mthreads-gmi LOG==================
Timestamp                     : Fri Nov  7 11:02:31 2025
Driver Version                : 3.3.2-server
Attached GPUs                 : 2

GPU0  00000000:2a:00.0
    Product Name              : MTT S5000
    Product Brand             : MTT
GPU1  00000000:2b:00.0
    Product Name              : MTT S4000
    Product Brand             : MTT
"""


def test_musa_names_from_the_drivers_own_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The S5000 has no public PCI number, and a container may hide sysfs."""
    assert musa.product_names(GMI) == ["MTT S5000", "MTT S4000"]
    vendor_tool(tmp_path, monkeypatch, "mthreads-gmi", f"cat <<'END'\n{GMI}\nEND")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    tree(tmp_path, {"dev/mtgpu.0": "", "dev/mtgpu.1": ""})
    assert archs(musa.probe(tmp_path, {})) == ["mp31", "mp22"]
    tree(tmp_path, pci("0000:2a:00.0", "0x1ed5", "0x0400", "0x030200"))
    with pytest.raises(LookupError, match="2a:00"):
        musa.probe(tmp_path, {})  # one card, two names: which is it?
    tree(tmp_path, pci("0000:2b:00.0", "0x1ed5", "0x0323", "0x030200"))
    assert [(d.arch, d.bus_id) for d in musa.probe(tmp_path, {})] == [
        ("mp31", "0000:2a:00.0"),
        ("mp22", "0000:2b:00.0"),
    ]


@pytest.mark.parametrize("script", ["exit 3", "echo 'Product Name : MTT S5000'; exit 1", "echo nonsense"])
def test_musa_nodes_that_nothing_explains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    vendor_tool(tmp_path, monkeypatch, "mthreads-gmi", script)
    with pytest.raises(LookupError, match="check the driver"):
        musa.probe(tree(tmp_path, {"dev/mtgpu.0": ""}), {})


def test_musa_says_which_runtime_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name, version in (("torch_musa", "2.7.1"), ("torchada", "0.1.51")):
        tree(
            site, {f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
        )
    tree(tmp_path, {"dev/mtgpu.0": "", "usr/local/musa/version.json": '{"musa_toolkits": {"version": "4.3.6"}}'})
    tree(tmp_path, pci("0000:2a:00.0", "0x1ed5", "0x0323", "0x030200"))
    monkeypatch.syspath_prepend(site)
    (found,) = musa.probe(tmp_path, {})
    assert found.versions == {"musa": "4.3.6", "runtime": "torch_musa 2.7.1, torchada 0.1.51"}
    (elsewhere,) = musa.probe(tmp_path, {"MUSA_HOME": "/opt/musa"})
    assert elsewhere.versions["musa"] == "", "present, version unknown"


def test_musa_says_what_it_cannot_place(tmp_path: Path) -> None:
    tree(tmp_path, {"dev/mtgpu.0": ""})
    tree(tmp_path, pci("0000:2a:00.0", "0x1ed5", "0x9999", "0x030200"))
    with pytest.raises(LookupError, match="mthreads-ml-py"):
        musa.probe(tmp_path, {})
    assert musa.probe(tmp_path, {"MUSA_VISIBLE_DEVICES": ""}) == ()


# ---- rocm ------------------------------------------------------------------------------------------------------------


def node(i: int, target: int, *, minor: int = 0, bus: int = 0, name: str = "") -> dict[str, str]:
    base = f"sys/class/kfd/kfd/topology/nodes/{i}"
    simd = 304 if target else 0
    return {
        f"{base}/properties": f"cpu_cores_count 8\nsimd_count {simd}\ngfx_target_version {target}\n"
        f"location_id {bus << 8}\ndomain 0\ndrm_render_minor {minor}\nunique_id {i + 0xABC}\n",
        f"{base}/name": name + "\n",
        f"{base}/mem_banks/0/properties": "heap_type 1\nsize_in_bytes 206142726144\n",
        f"{base}/mem_banks/1/properties": "heap_type 0\nsize_in_bytes 999\n",
        **({f"dev/dri/renderD{minor}": ""} if minor else {}),
    }


@pytest.fixture
def amd(tmp_path: Path) -> Path:
    """A CPU node, and GPUs in numeric order of their nodes: 10 comes after 2."""
    tree(tmp_path, node(0, 0))
    tree(tmp_path, node(2, 90402, minor=128, bus=0x75, name="ip discovery"))
    tree(tmp_path, node(10, 90500, minor=129, bus=0x85))
    return tree(tmp_path, {"opt/rocm/.info/version": "7.1.0-83\n"})


def test_rocm_from_topology(amd: Path) -> None:
    found = rocm.probe(amd, {})
    assert archs(found) == ["gfx942", "gfx950"]
    assert found[0].total_memory == 206142726144
    assert found[0].bus_id == "0000:75:00.0"
    assert found[0].versions["rocm"] == "7.1.0"
    assert "mfma" in found[0].isa
    assert found[1].shared_memory_per_block == 160 << 10


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["gfx950"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["gfx950"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["gfx942"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["gfx950"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, []),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000ac6"}, ["gfx950"]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_rocm_visible_devices(amd: Path, environ: dict[str, str], expected: list[str]) -> None:
    assert archs(rocm.probe(amd, environ)) == expected


def test_rocm_leaves_out_gpus_this_process_cannot_open(amd: Path) -> None:
    (amd / "dev/dri/renderD128").unlink()
    assert archs(rocm.probe(amd, {})) == ["gfx950"]


@pytest.mark.parametrize("node", ["dev/kfd", "dev/dri/renderD129"])
def test_rocm_gpus_that_this_user_may_not_open(monkeypatch: pytest.MonkeyPatch, amd: Path, node: str) -> None:
    tree(amd, {"dev/kfd": ""})
    assert len(rocm.probe(amd, {})) == 2
    shut(monkeypatch, amd / node)
    with pytest.raises(LookupError, match=f"{node}.*group render"):
        rocm.probe(amd, {})


@pytest.mark.parametrize(
    ("target", "arch"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110000, "gfx1100"), (110501, "gfx1151"),
     (120001, "gfx1201"), (120500, "gfx1250")],
)  # fmt: skip
def test_rocm_arch_names(target: int, arch: str) -> None:
    assert rocm.arch_of(target) == arch


# ---- ascend ----------------------------------------------------------------------------------------------------------


def npus(*numbers: str, nodes: int) -> dict[str, str]:
    files = {f"dev/davinci{i}": "" for i in range(nodes)}
    files["dev/davinci_manager"] = ""
    for i, number in enumerate(numbers):
        files.update(pci(f"0000:{i + 1:02x}:00.0", "0x19e5", number, "0x120000"))
    files.update(pci("0000:f0:00.0", "0x19e5", "0x0222", "0x020000"))  # Huawei's network card
    return files


def test_ascend_from_pci_numbers(tmp_path: Path) -> None:
    found = ascend.probe(tree(tmp_path, npus("0xd802", "0xd802", nodes=2)), {})
    assert archs(found) == ["910b", "910b"]
    assert [d.bus_id for d in found] == ["0000:01:00.0", "0000:02:00.0"]
    assert "cube_bf16" in found[0].isa


def test_ascend_two_dies_behind_one_function(tmp_path: Path) -> None:
    found = ascend.probe(tree(tmp_path, npus("0xd803", nodes=2)), {})
    assert archs(found) == ["910c", "910c"]
    assert [d.bus_id for d in found] == [None, None]


@pytest.mark.parametrize(("visible", "indices"), [("0,2", [0, 1]), ("2,0", []), ("1,1", []), ("9", []), ("", [])])
def test_ascend_ids_must_ascend(tmp_path: Path, visible: str, indices: list[int]) -> None:
    tree(tmp_path, npus("0xd802", "0xd802", "0xd802", nodes=3))
    assert [d.index for d in ascend.probe(tmp_path, {"ASCEND_RT_VISIBLE_DEVICES": visible})] == indices


@pytest.mark.parametrize("numbers", [(), ("0xdead",), ("0xd500", "0xd802", "0xd803")])
def test_ascend_does_not_guess(tmp_path: Path, numbers: tuple[str, ...]) -> None:
    with pytest.raises(LookupError):
        ascend.probe(tree(tmp_path, npus(*numbers, nodes=2)), {})


# As npu-smi info -m prints it: NPU 4 carries a chip and a management controller.
SMI = """\
        NPU ID                         Chip ID                        Chip Logic ID                  Chip Name
        4                              0                              {0}                              {1}
        4                              1                              -                              Mcu
        5                              0                              {2}                              {3}
        5                              1                              -                              Mcu
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("Ascend 910B3", "Ascend 910B3"), ["910b", "910b"]), (("Ascend310P3", "Ascend910_9392"), ["310p", "910c"]),
     (("Ascend950PR_9579", "Ascend910_9589"), ["950", "950"]), (("910B4", "310P"), ["910b", "310p"]),
     (("Ascend910", "Ascend910B1"), [])],
)  # fmt: skip
def test_ascend_chip_names(names: tuple[str, str], expected: list[str]) -> None:
    assert ascend.chip_archs(SMI.format(0, names[0], 1, names[1])) == expected
    assert ascend.chip_archs(SMI.format(1, names[0], 0, names[1])) == expected[::-1], "in the order of logic ids"


def test_ascend_asks_the_drivers_own_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For chips whose PCI number the table lacks, hosts with unlike ones, and containers without sysfs."""
    tree(tmp_path, npus("0xdead", nodes=2))
    text = SMI.format(0, "Ascend950PR", 1, "Ascend950PR")
    vendor_tool(tmp_path, monkeypatch, "npu-smi", f'[ "$1 $2" = "info -m" ] || exit 1\necho "{text}"')
    assert archs(ascend.probe(tmp_path, {})) == ["950", "950"]
    assert [d.index for d in ascend.probe(tmp_path, {"ASCEND_RT_VISIBLE_DEVICES": "1"})] == [0]
    tree(tmp_path, {"dev/davinci2": ""})
    with pytest.raises(LookupError, match="0xdead"):  # three nodes, two names
        ascend.probe(tmp_path, {})


def test_ascend_versions(tmp_path: Path) -> None:
    tree(tmp_path, npus("0xd802", nodes=1))
    (bare,) = ascend.probe(tmp_path, {})
    assert bare.versions == {}
    tree(
        tmp_path,
        {
            "usr/local/Ascend/driver/version.info": "Version=24.1.rc3\nascendhal_version=7.35.23\n",
            "opt/cann/aarch64-linux/ascend_toolkit_install.info": "package_name=Ascend-cann-toolkit\nversion=8.5.0\n",
            "usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info": "version=8.3.RC1\n",
        },
    )
    (found,) = ascend.probe(tmp_path, {})
    assert found.versions == {"driver": "24.1.rc3", "cann": "8.3.RC1"}
    (found,) = ascend.probe(tmp_path, {"ASCEND_HOME_PATH": "/opt/cann"})
    assert found.versions["cann"] == "8.5.0"


# ---- intel -----------------------------------------------------------------------------------------------------------


def card(root: Path, minor: int, address: str, number: str, vendor: str = "0x8086") -> None:
    base = f"sys/devices/{address}"
    tree(root, {f"{base}/vendor": vendor, f"{base}/device": number, f"dev/dri/renderD{minor}": ""})
    (root / f"sys/class/drm/renderD{minor}").mkdir(parents=True)
    (root / f"sys/class/drm/renderD{minor}/device").symlink_to(root / base)


def test_intel_reports_gpus_with_kernels_only(tmp_path: Path) -> None:
    card(tmp_path, 128, "0000:00:02.0", "0x4680")  # the graphics of a CPU
    card(tmp_path, 129, "0000:05:00.0", "0xe20b")
    card(tmp_path, 130, "0000:03:00.0", "0x0bd5")
    card(tmp_path, 131, "0000:07:00.0", "0xe20b", vendor="0x1002")
    found = intel.probe(tmp_path, {})
    assert [(d.arch, d.bus_id) for d in found] == [("pvc", "0000:03:00.0"), ("bmg", "0000:05:00.0")]
    assert archs(intel.probe(tmp_path, {"ZE_AFFINITY_MASK": "1"})) == ["bmg"]
    assert archs(intel.probe(tmp_path, {"ZE_AFFINITY_MASK": "0.1"})) == ["pvc"]
    assert archs(intel.probe(tmp_path, {"ZE_AFFINITY_MASK": ""})) == ["pvc", "bmg"]
    (tmp_path / "dev/dri/renderD129").unlink()
    assert archs(intel.probe(tmp_path, {})) == ["pvc"]


def test_intel_gpus_that_this_user_may_not_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card(tmp_path, 128, "0000:00:02.0", "0x4680")  # the graphics of a CPU, which are none of our business
    card(tmp_path, 129, "0000:05:00.0", "0xe20b")
    shut(monkeypatch, tmp_path / "dev/dri/renderD128")
    assert archs(intel.probe(tmp_path, {})) == ["bmg"]
    shut(monkeypatch, tmp_path / "dev/dri/renderD129")
    with pytest.raises(LookupError, match=r"renderD129.*group render"):
        intel.probe(tmp_path, {})


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_a_tool_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probing, "TOOL_SECONDS", 0.2)
    vendor_tool(tmp_path, monkeypatch, "npu-smi", "while true; do :; done")
    assert probing.tool("npu-smi", "info") == ""
    assert probing.tool("mthreads-gmi") == "", "not installed"
