// What the state of a replica means to a person.

const STATES = {
  REPLICA_STATE_SERVING: { label: "serving", kind: "good" },
  REPLICA_STATE_STARTING: { label: "starting", kind: "warn" },
  REPLICA_STATE_DRAINING: { label: "draining", kind: "warn" },
  REPLICA_STATE_UNHEALTHY: { label: "unhealthy", kind: "bad" },
  REPLICA_STATE_UNREACHABLE: { label: "unreachable", kind: "bad" },
};

/** A word, and `good`, `warn` or `bad`. */
export const stateOfReplica = (replica) => STATES[replica.state] ?? { label: "not known", kind: "warn" };

/** All replicas of a snapshot. */
export const replicasOf = (mesh) => (mesh.services ?? []).flatMap((service) => service.replicas ?? []);
