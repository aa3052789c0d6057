"""Embedding on Ray: the rows of the local run, and nothing lost when a worker is killed. One cluster of two nodes for all."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokexport.engines.embed.local import embed
from tokexport.engines.embed.options import EmbedOptions
from tokexport.tools.demo.digits import write_held_out

from tokexport import MissingPackageError, UsageError

COLUMNS = ("logits", "class", "score")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty photos, one of which is none."""
    folder = tmp_path_factory.mktemp("many")
    for i, path in enumerate(write_held_out(tmp_path_factory.mktemp("digits"), 60)):
        Image.open(path).convert("RGB").save(folder / f"{i:02d}.png")
    (folder / "07.png").write_text("no photo")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes on this machine. Skipped where there is no Ray."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokexport[ray]'")
    pytest.importorskip("ray.data", reason="Ray's data library is not installed: pip install 'tokexport[ray]'")
    utils = pytest.importorskip("ray.cluster_utils")
    # A driver that is told 127.0.0.1 takes the address by which others reach this machine; all of this cluster is on the loopback.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(ray._private.services, "resolve_ip_for_localhost", lambda host: host)
    node = {"num_cpus": 2, "object_store_memory": 150 << 20, "node_ip_address": "127.0.0.1"}
    cluster = utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
        monkeypatch.undo()


@pytest.fixture(scope="module")
def local(exported, photos, tmp_path_factory):
    """Rows and errors of the local run."""
    out = tmp_path_factory.mktemp("local") / "out"
    embed(exported("tiny_vit"), photos, output=out, options=EmbedOptions(columns=COLUMNS, part_size=7, threads=1))
    return tables(out)


def tables(folder):
    return [pq.read_table(folder / place).to_pydict() for place in ("parts", "errors")]


def same(ours, theirs):
    assert ours[1] == theirs[1] and len(ours[1]["index"]) == 1
    for name in ours[0]:
        if name in ("logits", "score"):
            assert np.allclose(ours[0][name], theirs[0][name], atol=1e-6)
        else:
            assert ours[0][name] == theirs[0][name]


@pytest.mark.programs
def test_a_cluster_of_two_nodes_gives_the_rows_of_the_local_run(cluster, local, exported, photos, tmp_path):
    import ray
    from tokexport.engines.embed.cluster import count_machines

    assert count_machines(cluster) == 2 and not ray.is_initialized()
    options = EmbedOptions(columns=COLUMNS, part_size=7, ray=cluster)
    report = embed(exported("tiny_vit"), photos, output=tmp_path / "out", options=options)
    assert report.computed == 60 and report.manifest.broken == 1
    same(tables(tmp_path / "out"), local)


@pytest.mark.programs
def test_a_killed_engine_loses_nothing(cluster, local, exported, photos, tmp_path):
    """The process of the actor that writes parts is killed when the first part is there."""
    out, killed = tmp_path / "out", []

    def kill():
        while not killed:
            if list((out / "parts").glob("part-*.parquet")):
                killed.extend(engines())
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    murder = threading.Thread(target=kill, daemon=True)
    murder.start()
    options = EmbedOptions(columns=COLUMNS, part_size=2, ray=cluster, actors=1)
    report = embed(exported("tiny_vit"), photos, output=out, options=options)
    murder.join()
    assert killed and report.computed == 60 and len(list((out / "parts").glob("part-*.parquet"))) == 30
    same(tables(out), local)


def engines() -> list[int]:
    """Processes that hold the file."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"_Engine" in title:
            pids.append(int(path.parent.name))
    return pids


@pytest.mark.programs
def test_wrong_clusters_are_told(cluster, exported, photos, tmp_path):
    for options, text in (
        (EmbedOptions(ray=cluster, threads=64), "no node has 64 CPUs"),
        (EmbedOptions(ray=cluster, columns=("features",)), "'features' is none that this file gives"),
        (EmbedOptions(ray="127.0.0.1:1"), "no cluster to be reached"),
        (EmbedOptions(ray="the moon"), "wanted HOST:PORT"),
    ):
        with pytest.raises(UsageError, match=text):
            embed(exported("tiny_vit"), photos, output=tmp_path / "out", options=options)
        assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(exported, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"tokexport\[ray\]"):
        embed(exported("tiny_vit"), photos, output=tmp_path / "out", options=EmbedOptions(ray="local"))
