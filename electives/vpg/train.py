"""Elective vpg: vanilla policy gradient on Gymnasium's environments.

Parent:  06_mlp_nn
New:     rewards_to_go, policy_loss, evaluate, draw_episode, draw_returns
Changed: minibatches, train, parse_args
Gone:    load_data

The model is a policy: it maps a state to the probabilities of the actions. No label says which
action is right; the policy acts, and rewards follow. Its parameters climb the gradient of the
expected return, the sum of an episode's rewards, which is (the policy gradient theorem)

    E[sum over t of grad log p(action_t | state_t) * (reward_t + reward_t+1 + ...)]

So the loss is a cross-entropy with the actions as labels, each weighted by its reward to go, the
rewards that follow. Subtracting a baseline from these, here the return that a second network
predicts from the state, leaves the expected gradient unchanged and greatly lowers its variance; the
differences are called advantages. A bonus for the policy's entropy, which decays to 0, keeps it
exploring at first. Look at returns.png, and at episode.png: frames of an episode, untrained (above)
and trained (below).

Try:     --n_frames 32 (returns are bootstrapped sooner: better or worse?), --entropy_coef 0, or
         the environment Acrobot-v1 with --n_layer 1 --n_frames 512 --learning_rate 0.005
         --max_iters 200 (-82.8 after 1.6 million frames, the median of five seeds; with
         --entropy_coef 0.03 two of them never swing to the top, and then all actions look alike)
Source:  Williams 1992, "Simple statistical gradient-following algorithms for connectionist
         reinforcement learning"; Sutton et al. 2000, "Policy gradient methods for reinforcement
         learning with function approximation"; Pardo et al. 2018, "Time limits in reinforcement
         learning" (bootstrapping at truncation); Williams and Peng 1991, "Function optimization
         using connectionist reinforcement learning algorithms" (the entropy bonus).
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.optim.lr_scheduler import LambdaLR
from torchvision.io import write_png
from tqdm import tqdm

from plot import plot_run, plt, read_metrics


# ---------- data ----------
def rewards_to_go(rewards, terminated, truncated, values, gamma):
    """Return the discounted sum of the rewards from each frame to the end of its episode, (T, N).

    A reward k frames later counts gamma^k: late rewards depend little on the action, and add noise.

    For T frames of N environments: rewards and flags (T, N), and the baseline's values (T + 1, N),
    one row more because frame t leads to the state of row t + 1. After an episode has terminated
    (the pole fell), no rewards follow. One that was truncated (its time was up), or that goes on in
    the next minibatch, would have had more: the value of its last state estimates them
    (bootstrapping).
    """
    returns = torch.empty_like(values)
    returns[-1] = values[-1]
    for t in reversed(range(len(rewards))):
        future = torch.where(truncated[t], values[t + 1], returns[t + 1])
        returns[t] = rewards[t] + gamma * ~terminated[t] * future
    return returns[:-1]


@torch.no_grad()
def minibatches(envs, policy, baseline, args):
    """Act forever; yield states x (B, D), actions y (B,) and rewards to go (B,) of B frames.

    N environments run in parallel, for T = n_frames; the next minibatch continues their episodes.
    """
    x, _ = envs.reset(seed=args.seed)
    x, done = torch.from_numpy(x), torch.zeros(args.n_envs, dtype=torch.bool)  # (N, D), (N,)
    while True:
        frames = []
        for _ in range(args.n_frames):
            # Gumbel-max: the argmax of logits plus Gumbel noise is a sample from the distribution.
            logits = policy(x)  # (N, A)
            y = (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1)  # (N,)
            x_next, reward, *ends = map(torch.from_numpy, envs.step(y.numpy())[:4])
            # After an episode's last state Gymnasium ignores the action and begins the next one:
            # such a frame is not valid.
            frames.append((x, y, ~done, reward, *ends))
            x, done = x_next, ends[0] | ends[1]  # terminated or truncated
        xs, ys, valid, rewards, terminated, truncated = map(torch.stack, zip(*frames))  # (T, N)
        values = baseline(torch.cat([xs, x[None]])).squeeze(2)  # (T + 1, N)
        returns = rewards_to_go(rewards, terminated, truncated, values, args.gamma)  # (T, N)
        yield xs[valid], ys[valid], returns[valid]


# ---------- model ----------
class MLP(nn.Module):
    """Maps x (B, D) to logits (B, C) through n_layer hidden layers of n_hidden units."""

    def __init__(self, n_inputs, n_hidden, n_layer, n_classes):
        super().__init__()
        sizes = [n_inputs] + n_layer * [n_hidden]
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], n_classes)
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in

    def forward(self, x):
        for layer in self.hidden:
            x = F.relu(layer(x))  # (B, n_hidden)
        return self.out(x)  # (B, C)


def policy_loss(logits, y, advantages):
    """Return a loss whose gradient estimates the negative policy gradient, up to a factor.

    Takes logits (B, C), actions y (B,) and advantages (B,), which are normalized: the size of the
    updates then does not depend on the scale of the rewards.
    """
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    return (F.cross_entropy(logits, y, reduction="none") * advantages).mean()


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(policy, args):
    """Return the mean return of eval_episodes in which the most probable action is taken."""
    envs = gym.make_vec(args.env, num_envs=args.eval_episodes)
    x, _ = envs.reset(seed=args.seed + 10**6)  # other episodes than those of training
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    while running.any():
        y = policy(torch.from_numpy(x)).argmax(dim=1)
        x, reward, terminated, truncated, _ = envs.step(y.numpy())
        returns += reward * running
        running &= ~(terminated | truncated)
    return returns.mean().item()


@torch.no_grad()
def draw_episode(policy, args):
    """Return 8 frames of an episode, from its first to its last, as an image (3, H, W) of bytes."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a display
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # else pygame's SDL ignores SIGTERM
    env = gym.make(args.env, render_mode="rgb_array")
    x, _ = env.reset(seed=args.seed)
    frames, done = [], False
    while not done:
        frame = env.render()  # (4 H, 4 W, 3)
        height, width = frame.shape[0] // 4, frame.shape[1] // 4
        frames.append(frame.reshape(height, 4, width, 4, 3).mean(axis=(1, 3)).astype(np.uint8))
        x, _, terminated, truncated, _ = env.step(policy(torch.from_numpy(x)).argmax().item())
        done = terminated or truncated
    strip = np.concatenate([frames[i * (len(frames) - 1) // 7] for i in range(8)], axis=1)
    return torch.from_numpy(strip).permute(2, 0, 1)


def draw_returns(args):
    """Write returns.png: the mean return against the number of frames seen until then."""
    records = read_metrics(args.out_dir)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for key in ("train_return", "test_return"):
        points = [(r["frames"] / 1e6, r[key]) for r in records if key in r]
        axis.plot(*zip(*points), marker=".", markersize=4, label=key)
    solved = records[-1]["solved"]
    axis.axhline(solved, color="gray", linestyle="--", label=f"solved, Gymnasium: {solved:.4g}")
    axis.set(title=f"Elective vpg: {args.env}")
    axis.set(xlabel="millions of frames", ylabel="return (mean of 100 episodes)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(args.out_dir / "returns.png", dpi=80)
    plt.close(figure)


# ---------- training ----------
def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    envs = RecordEpisodeStatistics(gym.make_vec(args.env, num_envs=args.n_envs))
    n_inputs, n_actions = envs.single_observation_space.shape[0], envs.single_action_space.n
    model = MLP(n_inputs, args.n_hidden, args.n_layer, n_actions)
    baseline = MLP(n_inputs, args.n_hidden, args.n_layer, 1)
    batches = minibatches(envs, model, baseline, args)
    groups = [
        {"params": model.parameters(), "lr": args.learning_rate},
        {"params": baseline.parameters(), "lr": args.baseline_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups)  # step 08 explains it
    schedule = LambdaLR(optimizer, lambda iter_num: 1 - iter_num / args.max_iters)
    episode, frames, losses = draw_episode(model, args), 0, {}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record |= {"frames": frames, "solved": gym.spec(args.env).reward_threshold, **losses}
            if envs.return_queue:  # of the last 100 episodes, whose actions were sampled
                record["train_return"] = float(np.mean(envs.return_queue))
            record["test_return"] = evaluate(model, args)
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # On-policy: a minibatch serves one update, as the theorem is about the policy that acted.
        x, y, returns = next(batches)
        frames += len(x)
        logits = model(x)
        values = baseline(x).squeeze(1)  # (B,)
        log_p = F.log_softmax(logits, dim=1)  # (B, A)
        entropy = -(log_p.exp() * log_p).sum(dim=1).mean()  # its bonus keeps actions random
        entropy_coef = args.entropy_coef * (1 - iter_num / args.max_iters)  # decays to 0
        loss = policy_loss(logits, y, returns - values.detach()) - entropy_coef * entropy
        baseline_loss = F.mse_loss(values, returns)
        losses = {"train_loss": loss.item(), "baseline_loss": baseline_loss.item()}
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        baseline_loss.backward()
        optimizer.step()
        schedule.step()

    episode = torch.cat([episode, draw_episode(model, args)], dim=1)
    write_png(episode, str(args.out_dir / "episode.png"))
    print(f"test return {record['test_return']:.1f} after {frames:,} frames")
    draw_returns(args)
    print(f"pictures: {plot_run(args.out_dir)}, returns.png, episode.png")
    return record


# ---------- command line ----------
def number(kind, low, high=1e9):
    """Return an argparse type: an int or float (kind) from low to high."""

    def convert(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise ValueError

    convert.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse's error shows it
    return convert


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("data").add_argument
    names = ["CartPole-v1", "Acrobot-v1", "LunarLander-v3"]
    flag("--env", choices=names, default=names[0], help="Gymnasium's environment")
    flag("--n_envs", type=number(int, 1), default=16, help="environments in parallel")
    flag("--n_frames", type=number(int, 2), default=256, help="frames per environment and update")
    flag("--gamma", type=number(float, 0, 1), default=0.99, help="discount factor; 0.98 to 0.999")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 0), default=2, help="number of hidden layers")
    flag("--n_hidden", type=number(int, 1), default=64, help="units per hidden layer")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=3e-3, help="initial; usually about 1e-3")
    flag("--baseline_learning_rate", type=number(float, 0), default=1e-2, help="initial")
    flag("--entropy_coef", type=number(float, 0), default=0.06, help="initial; usually 0 to 0.1")
    flag("--max_iters", type=number(int, 1), default=400, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=20, help="iterations between evaluations")
    flag("--eval_episodes", type=number(int, 1), default=100, help="episodes per evaluation")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small a model a second thread costs more than it gains
    try:
        train(parse_args())
    except (
        gym.error.DependencyNotInstalled,  # of LunarLander: Box2D
        FloatingPointError,
        MemoryError,
        OSError,
        RuntimeError,
    ) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
