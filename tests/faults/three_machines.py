"""The training job on a cluster of three raylets on this machine; `python three_machines.py run.yaml job.py`.

Writes the process ids of the raylets to stdout, the head's first. The head holds no CPU, so all work is on the others.
"""

import json
import os
import runpy
import sys

import ray
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 256 * 1024**2


def main(run_file: str, job: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES})
    nodes = [cluster.head_node]
    nodes += [cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=OBJECT_STORE_BYTES) for _ in range(2)]
    cluster.wait_for_nodes()
    print(json.dumps([node.all_processes["raylet"][0].process.pid for node in nodes]), flush=True)
    os.environ["RAY_ADDRESS"] = cluster.address
    sys.argv = [job, run_file]
    try:
        runpy.run_path(job, run_name="__main__")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
