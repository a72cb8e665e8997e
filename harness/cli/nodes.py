import dataclasses
import json

import click

from harness.cli.tables import print_table
from harness.cluster.schema import Cluster, load_cluster
from harness.cluster.slurm import Node, default_partition, hostnames, list_nodes
from harness.errors import ClusterError

BUSY = {"allocated", "completing", "mixed"}


@click.command("nodes")
@click.argument("partition", required=False)
@click.option("--cluster", help="A cluster file: how many nodes could take a job of its shape now.")
@click.option("--json", "as_json", is_flag=True, help="Every node, as a JSON object.")
def command(partition: str | None, cluster: str | None, as_json: bool):
    """Say what fits now: nodes, GPUs and CPUs that are free, by partition and GPU type, and why nodes are down."""
    wanted = load_cluster(cluster) if cluster else None
    partition = partition or (wanted and (wanted.partition or default_partition()))
    nodes = list_nodes()
    there = sorted({name for node in nodes for name in node.partitions})
    if partition and partition not in there:
        raise ClusterError(f"partition {partition}: there is no such partition here; there are {', '.join(there)}")
    shown = [node for node in nodes if not partition or partition in node.partitions]
    fitting = [node for node in shown if fits(node, wanted)] if wanted else []
    if as_json:
        of_shape = {"could_start_now": [node.name for node in fitting]} if wanted else {}
        click.echo(json.dumps({"nodes": [dataclasses.asdict(node) for node in shown], **of_shape}, indent=2))
        return
    groups = group(shown, [partition] if partition else there)
    heading = ("partition", "GPUs a node", "nodes", "idle", "partly free", "full", "down", "free GPUs", "free CPUs")
    print_table(heading, [row_of(*key, of_group) for key, of_group in groups.items()], right=heading[2:])
    for line in explain_down(shown):
        click.echo(line)
    if wanted:
        click.echo(describe_fit(wanted, partition, shown, fitting))


def group(nodes: list[Node], partitions: list[str]) -> dict[tuple[str, str], list[Node]]:
    """(partition, what GPUs a node has) -> nodes. A node of two partitions is in both."""
    groups: dict[tuple[str, str], list[Node]] = {}
    for partition in partitions:
        for node in nodes:
            if partition in node.partitions:
                groups.setdefault((partition, name_gpus(node.gpus)), []).append(node)
    return groups


def name_gpus(gpus: dict[str, int]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in gpus.items() if count) or "none"


def row_of(partition: str, gpus: str, nodes: list[Node]) -> tuple[str, ...]:
    usable = [node for node in nodes if node.is_usable]
    idle = [node for node in usable if node.state not in BUSY]
    partly = [node for node in usable if node not in idle and has_room(node)]
    counts = (
        len(nodes),
        len(idle),
        len(partly),
        len(usable) - len(idle) - len(partly),
        len(nodes) - len(usable),
        sum(sum(node.gpus_free.values()) for node in usable),
        sum(node.cpus_free for node in usable),
    )
    return (partition, gpus, *map(str, counts))


def has_room(node: Node) -> bool:
    """Something that a job like its others could get: a CPU, and a GPU where it has any."""
    return node.cpus_free > 0 and (not any(node.gpus.values()) or any(node.gpus_free.values()))


def explain_down(nodes: list[Node]) -> list[str]:
    """One line for each state and reason of nodes that take no jobs."""
    away: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        if not node.is_usable:
            away.setdefault((node.state, node.reason), []).append(node.name)
    return [f"{state}: {', '.join(names)}" + (f" ({reason})" if reason else "") for (state, reason), names in away.items()]


# ---- what a cluster file asks for


def fits(node: Node, cluster: Cluster) -> bool:
    """Whether a job of this shape could begin on the node now, as far as nodes tell."""
    free = node.gpus_free
    gpus = free.get(cluster.gpu_type, 0) if cluster.gpu_type else sum(free.values())
    return (
        node.is_usable
        and node.name not in hostnames(",".join(cluster.exclude))
        and gpus >= cluster.gpus_per_node
        and node.cpus_free >= (cluster.cpus_per_node or 1)
        and node.memory_free_mib >= (node.memory_mib if cluster.memory_gib == 0 else 1024 * (cluster.memory_gib or 0))
    )


def describe_fit(cluster: Cluster, partition: str | None, nodes: list[Node], fitting: list[Node]) -> str:
    kind = f" {cluster.gpu_type}" if cluster.gpu_type else ""
    shape = [f"{cluster.gpus_per_node}{kind} GPUs"] if cluster.gpus_per_node else []
    shape += [f"{cluster.cpus_per_node} CPUs"] if cluster.cpus_per_node else ["1 CPU"]
    shape += [f"{cluster.memory_gib} GiB"] if cluster.memory_gib else ["all its memory"] if cluster.memory_gib == 0 else []
    unchecked = ["limits of account and QOS", "jobs that are before it in the queue"]
    unchecked[:0] = [name for name in ("constraint", "reservation") if getattr(cluster, name)]
    return (
        f"{cluster.name}: {len(fitting)} of {len(nodes)} nodes of partition {partition} could begin with {', '.join(shape)} each now"
        + (f": {', '.join(node.name for node in fitting)}" if fitting else "")
        + f"\n(not looked at: {', '.join(unchecked)})"
    )
