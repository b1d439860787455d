"""A `Case` for every public function of `rlhf.losses`, one file a topic."""

from contracts import advantages, distillation, policy, preference, structure, supervised

TOPICS = (advantages, distillation, policy, preference, structure, supervised)
CASES = {name: case for topic in TOPICS for name, case in topic.CASES.items()}
assert len(CASES) == sum(len(topic.CASES) for topic in TOPICS)
