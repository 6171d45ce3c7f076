"""Elective vpg: the gradient is the policy gradient, returns end where episodes do, it learns."""

import itertools
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import ROOT, load_step, run_main
from torch.distributions import Categorical
from torchvision.io import read_image

vpg = load_step("electives/vpg")


class ScriptedEnvs:
    """Two environments: episodes of 3 frames that terminate, and of 5 that are truncated.

    A state is (environment, number of the episode, frame), and the reward 1 + frame. As with
    Gymnasium's vector environments, what follows the last state of an episode is the next one's
    first state, whatever the action, with reward 0.
    """

    lengths = np.array([3, 5])
    single_action_space = gym.spaces.Discrete(3)

    def reset(self, seed):
        self.seed, self.row, self.actions = seed, 0, []
        return self.state(0), {}

    def state(self, row):
        episode, frame = np.divmod(row, self.lengths + 1)
        return np.stack([np.arange(2), episode, frame], axis=1).astype(np.float32)

    def step(self, actions):
        self.actions.append(actions.copy())
        frame = self.row % (self.lengths + 1)
        self.row += 1
        last = frame == self.lengths - 1
        reward = np.where(frame < self.lengths, 1.0 + frame, 0.0)  # float64, as SyncVectorEnv's
        flags = np.array([True, False]), np.array([False, True])
        return self.state(self.row), reward, last & flags[0], last & flags[1], {}


def value(state):
    """Return a baseline's value of a state (environment, episode, frame): all different."""
    return 1000 * state[..., 0] + 100 * state[..., 1] + 10 * state[..., 2] + 7


def baseline(states):
    return value(states)[..., None]


def uniform(states):
    return torch.zeros(*states.shape[:-1], 3)


def run(out_dir, *flags):
    """Run the elective; return its arguments and the records of metrics.jsonl."""
    args = vpg.parse_args([*flags, "--out_dir", str(out_dir)])
    final = vpg.train(args)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert final == records[-1]
    return args, records


# ---------- returns ----------


def test_returns_of_hand_made_rewards():
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0]] * 3)
    values = torch.tensor([[90.0, 91.0, 92.0, 93.0]] * 3 + [[8.0, 8.0, 8.0, 8.0]])
    values[2] = 4
    #                            ends never, terminated at 1, truncated at 1, both at 1
    terminated = torch.tensor([[False] * 4, [False, True, False, True], [False] * 4])
    truncated = torch.tensor([[False] * 4, [False, False, True, True], [False] * 4])
    returns = vpg.rewards_to_go(rewards, terminated, truncated, values, 0.5)
    expected = [[2.75, 3.5, 5], [1.5, 1, 5], [2.5, 3, 5], [1.5, 1, 5]]
    assert returns.T.tolist() == expected


@pytest.mark.parametrize("gamma", [0, 0.9, 1])
def test_returns_are_those_of_a_loop_over_the_future(gamma):
    torch.manual_seed(0)
    rewards, values = torch.randn(20, 7), torch.randn(21, 7)
    terminated, truncated = torch.rand(2, 20, 7) < 0.15
    assert (terminated & truncated).any()
    returns = vpg.rewards_to_go(rewards, terminated, truncated, values, gamma)
    for t, n in itertools.product(range(20), range(7)):
        total, discount = 0.0, 1.0
        for k in range(t, 20):
            total += discount * rewards[k, n].item()
            discount *= gamma
            if terminated[k, n]:
                break
            if truncated[k, n] or k == 19:
                total += discount * values[k + 1, n].item()
                break
        assert returns[t, n].item() == pytest.approx(total, abs=1e-5)


def test_minibatches_cut_episodes_and_returns_where_they_end():
    envs, n_frames, gamma = ScriptedEnvs(), 4, 0.9
    args = SimpleNamespace(seed=5, n_envs=2, n_frames=n_frames, gamma=gamma)
    batches = vpg.minibatches(envs, uniform, baseline, args)
    for start in range(0, 6 * n_frames, n_frames):
        x, y, returns = next(batches)
        assert envs.row == start + n_frames  # data of the present policy, not of an earlier one
        expected = []
        for row, n in itertools.product(range(start, start + n_frames), range(2)):
            length = envs.lengths[n]
            if row % (length + 1) == length:  # here an episode begins: nobody acts
                continue
            total, discount = 0.0, 1.0
            for k in range(row, start + n_frames):
                frame = k % (length + 1)
                total += discount * (1 + frame)
                discount *= gamma
                ends = frame == length - 1
                if ends and n == 0:  # terminated
                    break
                if ends or k == start + n_frames - 1:  # truncated, or to be continued
                    total += discount * value(envs.state(k + 1)[n])
                    break
            expected.append((envs.state(row)[n].tolist(), envs.actions[row][n], total))
        states, actions, totals = zip(*expected)
        assert x.tolist() == list(states)
        assert y.tolist() == list(actions)
        assert returns.tolist() == pytest.approx(totals, rel=1e-5)
        assert x.dtype == returns.dtype == torch.float32
    assert envs.seed == 5


def test_actions_are_samples_of_the_policy():
    log_p = torch.tensor([0.1, 0.6, 0.3]).log()
    args = SimpleNamespace(seed=0, n_envs=2, n_frames=4000, gamma=1)
    torch.manual_seed(0)
    _, y, _ = next(
        vpg.minibatches(ScriptedEnvs(), lambda x: 5 + log_p.expand(2, 3), baseline, args)
    )
    torch.testing.assert_close(y.bincount() / len(y), log_p.exp(), rtol=0, atol=0.02)


# ---------- the gradient ----------

P, ARM_REWARDS = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 4.0, -2.0])


def bandit_gradient():
    """Return the gradient of the expected reward sum_a p_a r_a with respect to the logits."""
    return P * (ARM_REWARDS - P @ ARM_REWARDS)


@pytest.mark.parametrize("scale", [1, 1000])
def test_expected_gradient_on_a_bandit_is_the_analytic_one(scale):
    logits = P.log().requires_grad_()
    y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # each action as often as its probability
    vpg.policy_loss(logits.expand(10, 3), y, scale * ARM_REWARDS[y] + 50).backward()
    std = (P @ ARM_REWARDS**2 - (P @ ARM_REWARDS) ** 2).sqrt()  # the normalization divides by it
    torch.testing.assert_close(-logits.grad, bandit_gradient() / std, rtol=1e-4, atol=1e-5)


def test_a_baseline_keeps_the_expected_gradient_and_lowers_its_variance():
    """In either of two states stands the same bandit, but one state adds 20 to every reward."""
    torch.manual_seed(0)
    gradients = {"none": [], "learned": []}
    for _ in range(1500):
        state, y = torch.randint(2, (16,)), Categorical(P).sample((16,))
        returns = ARM_REWARDS[y] + 20 * state
        for name, weights in (("none", returns), ("learned", returns - 20 * state)):
            logits = P.log().requires_grad_()
            vpg.policy_loss(logits.expand(16, 3), y, weights).backward()
            gradients[name].append(-logits.grad * weights.std(correction=0))
    none, learned = map(torch.stack, gradients.values())
    expected = (1 - 1 / 16) * bandit_gradient()  # the mean subtracted has a 16th of each return
    for samples in (none, learned):
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - expected).abs() < 4 * error).all()
    assert (learned.var(0) < 0.1 * none.var(0)).all()


def test_one_advantage_is_no_advantage():
    logits = torch.zeros(1, 3, requires_grad=True)
    vpg.policy_loss(logits, torch.tensor([1]), torch.tensor([5.0])).backward()
    assert not logits.grad.any()  # and not nan


# ---------- evaluation ----------


def test_every_seed_is_evaluated_in_other_episodes_which_repeat():
    def evaluate(seed):
        args = SimpleNamespace(env="CartPole-v1", eval_episodes=8, seed=seed)
        return vpg.evaluate(lambda x: x[:, 2:] * torch.tensor([0.0, 1.0]), args)

    assert evaluate(1) == evaluate(1)
    assert len({evaluate(seed) for seed in range(4)}) > 1


def test_evaluation_takes_the_most_probable_action_in_first_episodes(monkeypatch):
    envs = ScriptedEnvs()
    monkeypatch.setattr(gym, "make_vec", lambda name, num_envs: envs)
    args = SimpleNamespace(env="some", eval_episodes=2, seed=3)
    assert vpg.evaluate(lambda x: F.one_hot(x[:, 2].long() % 3, 3) - 10.0, args) == (6 + 15) / 2
    assert [a.tolist() for a in envs.actions] == [[f % 3] * 2 for f in range(3)] + [[0, 0], [0, 1]]
    assert envs.seed != args.seed


def test_strip_shows_an_episode_from_its_first_to_its_last_frame(monkeypatch):
    class Env:
        def reset(self, seed):
            self.frame = 0
            return np.zeros(2, dtype=np.float32), {}

        def render(self):
            return np.full((40, 60, 3), self.frame, dtype=np.uint8)

        def step(self, action):
            assert action == 1
            self.frame += 1
            return np.zeros(2, dtype=np.float32), 1.0, False, self.frame == 15, {}

    monkeypatch.setattr(gym, "make", lambda name, render_mode: Env())
    args = SimpleNamespace(env="some", seed=0)
    strip = vpg.draw_episode(lambda x: torch.tensor([0.0, 2.0, 1.0]), args)
    assert strip.shape == (3, 10, 8 * 15)
    assert strip[0, 0, ::15].tolist() == list(range(0, 15, 2))
    assert (strip == strip[:1, :1]).all()


def test_the_picture_shows_the_returns_by_frames(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(vpg.plt, "close", figures.append)
    records = [
        {"iter": 0, "frames": 0, "solved": -100, "test_return": -500},
        {"iter": 5, "frames": 70000, "solved": -100, "test_return": -90, "train_return": -95},
        {"iter": 9, "frames": 2000000, "solved": -100, "test_return": -80, "train_return": -85},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    vpg.draw_returns(SimpleNamespace(out_dir=tmp_path, env="Acrobot-v1"))
    axis = figures[0].axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines[:2]}
    assert lines == {
        "train_return": [[0.07, -95], [2, -85]],
        "test_return": [[0, -500], [0.07, -90], [2, -80]],
    }
    assert axis.lines[2].get_ydata()[0] == -100 and "-100" in axis.lines[2].get_label()
    assert axis.get_xlabel() == "millions of frames" and "return" in axis.get_ylabel()
    assert "Acrobot-v1" in axis.get_title()
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")


def test_pygame_leaves_the_signals_alone(tmp_path):
    """SDL would catch SIGTERM, and `kill` would not end a run."""
    code = "import os, train; train.draw_episode(lambda x: x[:2], train.parse_args([])); "
    code += "os.kill(os.getpid(), 15); os._exit(0)"
    folder = ROOT / "electives" / "vpg"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == -signal.SIGTERM


# ---------- training ----------


def test_training_follows_the_gradient_of_advantages_and_fits_the_baseline(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(vpg.tqdm, "set_postfix", lambda bar, loss, refresh: shown.append(loss))
    flags = "--max_iters 5 --eval_interval 2 --n_envs 3 --n_frames 40 --n_hidden 8 --n_layer 1"
    flags += " --learning_rate 0.03 --baseline_learning_rate 0.1 --gamma 0.9 --eval_episodes 4"
    flags += " --entropy_coef 0.3"  # like the learning rates, it decays linearly to 0
    args, records = run(tmp_path, *flags.split())
    torch.manual_seed(args.seed)
    policy, critic = vpg.MLP(4, 8, 1, 2), vpg.MLP(4, 8, 1, 1)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", num_envs=3))
    batches = vpg.minibatches(envs, policy, critic, args)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (policy, critic)]
    frames, expected, losses = 0, [], {}
    for i in range(6):
        decay = (5 - i) / 5
        if i in (0, 2, 4, 5):
            expected.append(
                {"iter": i, "frames": frames, "test_return": vpg.evaluate(policy, args)}
            )
            if i > 0:
                expected[-1] |= losses
                expected[-1]["train_return"] = np.mean(envs.return_queue)
        x, y, returns = next(batches)
        frames += len(x)
        advantages = returns - critic(x)[:, 0]
        baseline_loss = (advantages**2).mean()
        weights = ((advantages - advantages.mean()) / advantages.std(correction=0)).detach()
        actions = Categorical(logits=policy(x))
        loss = -(actions.log_prob(y) * weights).mean() - decay * 0.3 * actions.entropy().mean()
        losses = {"train_loss": loss.item(), "baseline_loss": baseline_loss.item()}
        if i < 5:
            assert float(shown[i]) == pytest.approx(losses["train_loss"], rel=1e-3, abs=1e-4)
        for optimizer, objective, rate in zip(optimizers, (loss, baseline_loss), (0.03, 0.1)):
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
    assert len(records) == len(expected)
    for record, other in zip(records, expected):
        assert {k: v for k, v in record.items() if k not in ("seconds", "solved")} == {
            key: pytest.approx(level, rel=1e-3, abs=1e-5) for key, level in other.items()
        }
        assert record["solved"] == 475
    assert read_image(str(tmp_path / "episode.png")).shape == (3, 2 * 100, 8 * 150)
    assert (tmp_path / "returns.png").exists()


def test_it_learns_to_balance_the_pole(tmp_path):
    flags = "--max_iters 20 --eval_interval 20 --n_envs 32 --n_frames 128 --eval_episodes 20"
    first, last = run(tmp_path, *flags.split())[1]
    assert first["test_return"] < 12
    assert last["test_return"] > 100
    assert last["train_return"] > 60


def test_evaluation_leaves_training_as_it_is(tmp_path):
    flags = "--max_iters 4 --n_envs 3 --n_frames 40 --n_hidden 8 --eval_episodes 4".split()
    often = run(tmp_path / "often", *flags, "--eval_interval", "1")[1][-1]
    once = run(tmp_path / "once", *flags, "--eval_interval", "4")[1][-1]
    assert {**often, "seconds": 0} == {**once, "seconds": 0}


def test_a_diverging_run_ends_with_one_line(tmp_path):
    flags = "--max_iters 9 --eval_interval 3 --n_envs 4 --n_frames 40 --eval_episodes 4"
    flags += " --learning_rate 1e9 --baseline_learning_rate 1e9 --n_layer 9"
    code, errors = run_main("electives/vpg", *flags.split(), "--out_dir", tmp_path)
    assert code == 2
    assert "--learning_rate 1000000000.0" in errors and len(errors.splitlines()) == 1


def test_an_environment_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    def make_vec(*args, **kwargs):
        raise gym.error.DependencyNotInstalled("Box2D is not installed")

    monkeypatch.setattr(gym, "make_vec", make_vec)
    code, errors = run_main("electives/vpg", "--env", "LunarLander-v3", "--out_dir", tmp_path)
    assert (code, errors) == (2, "train.py: error: Box2D is not installed\n")
