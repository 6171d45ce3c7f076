"""The bugs that play.py plants. Spoilers: read on only when you have played."""

from typing import NamedTuple

WORDS = "test_11_13_words.py::"
MNIST = "test_07_10_mnist.py::"
SYNTHETIC = "test_01_06_synthetic.py::"


class Bug(NamedTuple):
    """A text of a step's train.py that occurs there once, and what is planted in its place."""

    step: str
    name: str
    original: str
    planted: str
    flags: str  # of a short run that shows the symptom
    symptom: str  # as the user of the step reports it
    hints: list[str]
    lesson: str
    test: str  # in tests/: it passes on the step, and fails on the copy with the bug


BUGS = [
    # ---------- 01_linreg_numpy ----------
    Bug(
        step="01_linreg_numpy",
        name="a gradient without the 1/B of the mean",
        original="    d_y_hat = 2 / len(y) * (y_hat - y)  # (B,)",
        planted="    d_y_hat = 2 * (y_hat - y)  # (B,)",
        flags="",
        symptom="The loss grows instead of falling: at iteration 120 it is 2e148, and at"
        " iteration 250 the run ends because the loss is no longer finite. The learning"
        " rate, 0.02, is the usual one.",
        hints=[
            "Write down the loss with its sum over the minibatch, and derive its gradient.",
            "Compare backward with finite differences: by what factor do they differ? What is the"
            " factor with --batch_size 64?",
        ],
        lesson="The loss is a mean over the minibatch, and so is its gradient: without the factor"
        " 1/B the learning rate that works depends on the batch size.",
        test=SYNTHETIC + "test_01_hand_gradient_equals_central_differences",
    ),
    Bug(
        step="01_linreg_numpy",
        name="a bias whose gradient is averaged twice",
        original='    return {"w": (d_y_hat * x).sum(), "b": d_y_hat.sum()}',
        planted='    return {"w": (d_y_hat * x).sum(), "b": d_y_hat.mean()}',
        flags="",
        symptom="The loss ends at 1.98 instead of 0.248, and it is still falling when the run"
        " ends, very slowly. The largest error of a parameter is still 1.32.",
        hints=[
            "Print the two parameters beside the teacher's: one of them is right.",
            "The chain rule sums over all the ways by which a parameter reaches the loss.",
        ],
        lesson="A parameter that is broadcast over the examples gets the sum of their gradients;"
        " the 1/B of the mean is in dL/dy_hat already.",
        test=SYNTHETIC + "test_01_hand_gradient_equals_central_differences",
    ),
    Bug(
        step="01_linreg_numpy",
        name="variance and standard deviation confused",
        original="rng.normal(scale=args.noise, size=args.n_examples)",
        planted="rng.normal(scale=args.noise**2, size=args.n_examples)",
        flags="",
        symptom="The training loss ends at 0.0621, although the noise variance, the lowest loss"
        " to expect, is 0.25. The parameters are right. Have I beaten the noise?",
        hints=[
            "A result that is too good is a symptom, too: where does the lowest loss come from?",
            "Compute the standard deviation of y - forward(teacher, x), and compare it with"
            " --noise.",
        ],
        lesson="A loss below the noise variance means that the data, not the model, differ from"
        " what you think: check units, here a standard deviation against a variance.",
        test=SYNTHETIC + "test_the_examples_are_the_teachers_line_plus_noise[step_01_linreg_numpy]",
    ),
    Bug(
        step="01_linreg_numpy",
        name="examples shuffled, their labels not",
        original="            yield x[batch], y[batch]",
        planted="            yield x[batch], y[i : i + batch_size]",
        flags="--seed 3",
        symptom="With --seed 3 the loss ends at 35.7 instead of 0.250. The bias is about right,"
        " but the slope stays near 0, far from the teacher's 6.12: the largest error of"
        " a parameter is 5.96.",
        hints=[
            "Which w is best if x says nothing about y? Look at what a minibatch contains.",
            "Let x be 0, 1, 2, ... and y = -x, and print what minibatches yields.",
        ],
        lesson="Inputs and labels must be permuted by the same indices: a model that learns only"
        " the mean of y is a hint that they were shuffled apart.",
        test=SYNTHETIC + "test_every_epoch_shows_each_example_once_with_its_own_label"
        "[step_01_linreg_numpy-4-sizes1]",
    ),
    # ---------- 02_linreg_torch ----------
    Bug(
        step="02_linreg_torch",
        name="gradients not zeroed",
        original="                params[name].grad = None  # backward adds to .grad; start the"
        " next one from zero\n",
        planted="",
        flags="",
        symptom="With the same seed, step 01's loss ends at 0.248. Mine does not settle: it"
        " rises and falls, is 0.86 at iteration 130, and ends at 2.11, close to where it"
        " began (2.28).",
        hints=[
            "Print params['w'].grad in every iteration, and compute it by hand, too.",
            "loss.backward() adds to .grad. Who sets it back?",
        ],
        lesson="backward accumulates into .grad, so it has to be cleared before every update, or"
        " the update follows the sum of all gradients so far, and oscillates.",
        test=SYNTHETIC
        + "test_every_update_goes_against_the_gradient_of_a_new_minibatch[step_02_linreg_torch]",
    ),
    Bug(
        step="02_linreg_torch",
        name="(B,) broadcast against (B, 1)",
        original="        loss = loss_fn(y_hat, y)\n",
        planted="        loss = loss_fn(y_hat, y[:, None])\n",
        flags="--seed 3",
        symptom="With --seed 3 the loss ends at 37.2 instead of 0.250. Gradients come from"
        " autograd, so they must be right, and yet the slope stays near 0, far from the"
        " teacher's 6.12: the model predicts the mean of the labels.",
        hints=[
            "Which w is best if every prediction is compared with every label of the minibatch?",
            "Print the shape of y_hat - y inside loss_fn.",
        ],
        lesson="Shapes (B,) and (B, 1) broadcast to (B, B) without an error: every prediction is"
        " compared with every label, and the best that the model can do is to predict their mean.",
        test=SYNTHETIC
        + "test_every_update_goes_against_the_gradient_of_a_new_minibatch[step_02_linreg_torch]",
    ),
    Bug(
        step="02_linreg_torch",
        name="a computation graph in evaluation",
        original="            with torch.no_grad():  # no computation graph where no gradient is"
        ' needed\n                record["train_loss"] = loss_fn(',
        planted='            record["train_loss"] = loss_fn(',
        flags="--n_examples 3000000 --max_iters 50",
        symptom="The losses are right in every digit, but evaluation takes more time and memory"
        " than it should. With millions of examples (--n_examples 3000000) the"
        " difference is plain.",
        hints=[
            "What does PyTorch keep for a backward pass, also for one that never comes?",
            "In which part of the loop is there a forward pass without a backward pass?",
        ],
        lesson="Outside torch.no_grad() every forward pass records a graph with its intermediate"
        " results; in evaluation, on all examples at once, this only costs memory and time.",
        test=SYNTHETIC + "test_an_evaluation_builds_no_computation_graph[step_02_linreg_torch]",
    ),
    Bug(
        step="02_linreg_torch",
        name="an average taken twice",
        original="                params[name] -= args.learning_rate * params[name].grad\n",
        planted="                params[name] -= args.learning_rate * params[name].grad / len(x)\n",
        flags="",
        symptom="With the same seed, step 01's loss ends at 0.248. Mine has fallen from 2.28 to"
        " only 1.99 by the end. With a far larger --learning_rate it works.",
        hints=[
            "Compare the first update with --batch_size 128 and with --batch_size 1.",
            "Where in the loss is the average over the minibatch?",
        ],
        lesson="The mean is in the loss, so the gradient is an average already: dividing it once"
        " more makes the learning rate B times smaller.",
        test=SYNTHETIC + "test_02_autograd_gives_the_curve_of_the_hand_gradient",
    ),
    Bug(
        step="02_linreg_torch",
        name="no reshuffling",
        original="    while True:\n        order = rng.permutation(len(x))\n",
        planted="    order = rng.permutation(len(x))\n    while True:\n",
        flags="--n_examples 512 --max_iters 40",
        symptom="The loss falls about as it should, but the minibatches look familiar. I"
        " printed the first label of every minibatch: with 512 examples and 128 per"
        " minibatch, every fourth one is the same, epoch after epoch.",
        hints=[
            "How often is the order of the examples drawn, and how often should it be?",
        ],
        lesson="A new permutation in every epoch makes the minibatches of each epoch new, unbiased"
        " samples; one that is drawn before the loop repeats the same minibatches forever.",
        test=SYNTHETIC + "test_every_epoch_shows_each_example_once_with_its_own_label"
        "[step_02_linreg_torch-4-sizes1]",
    ),
    # ---------- 03_vector_linreg ----------
    Bug(
        step="03_vector_linreg",
        name="a parameter that the optimizer does not know",
        original="            for name in params:\n",
        planted='            for name in ["w"]:\n',
        flags="",
        symptom="The loss ends at 40.8 instead of 0.251, the noise variance. It is almost flat"
        " by then, and so is the largest error of a parameter: 6.3649 at iteration 130"
        " and at the end.",
        hints=[
            "Compare every parameter with the teacher's: which one is it that never moves?",
            "Which parameters does the update go through?",
        ],
        lesson="A parameter that is left out of the update stays at its initial value; the rest of"
        " the model learns, so that only a known lowest loss gives it away.",
        test=SYNTHETIC
        + "test_every_update_goes_against_the_gradient_of_a_new_minibatch[step_03_vector_linreg]",
    ),
    Bug(
        step="03_vector_linreg",
        name="a learning rate off by a power of ten",
        original='flag("--learning_rate", type=number(float, 0), default=0.02,',
        planted='flag("--learning_rate", type=number(float, 0), default=0.002,',
        flags="",
        symptom="The loss falls smoothly from 214, but ends at 29.8 instead of 0.251, the noise"
        " variance.",
        hints=[
            "Is the curve still falling at the end? What does that say about its speed?",
            "Try several values of --learning_rate, each ten times the one before.",
        ],
        lesson="A loss that still falls in a straight line at the end was trained too slowly: the"
        " learning rate is the first hyperparameter to try, in powers of ten.",
        test=SYNTHETIC
        + "test_regression_reaches_the_noise_variance_and_the_teacher[step_03_vector_linreg]",
    ),
    Bug(
        step="03_vector_linreg",
        name="another loss than the one that is reported",
        original="    return ((y_hat - y) ** 2).mean()",
        planted="    return (y_hat - y).abs().mean()",
        flags="",
        symptom="The loss is 11.7 at the start, where step 03's is 214, and then falls along a"
        " straight line, to 8.5 at the end. The noise variance, 0.25, is far away.",
        hints=[
            "For Gaussian noise of standard deviation 0.5, what is the expected value of the"
            " squared error, and what that of the loss that you see?",
            "The expected absolute value of Gaussian noise is its standard deviation times"
            " sqrt(2 / pi).",
        ],
        lesson="The mean absolute error has another minimum value and another gradient (only its"
        " sign counts): compare losses only when they are the same function.",
        test=SYNTHETIC
        + "test_every_update_goes_against_the_gradient_of_a_new_minibatch[step_03_vector_linreg]",
    ),
    Bug(
        step="03_vector_linreg",
        name="labels in an order of their own",
        original="            yield x[batch], y[batch]",
        planted="            yield x[batch], y[rng.permutation(batch)]",
        flags="",
        symptom="The loss does not fall below 169 or so and fluctuates, where it should end at"
        " 0.251. The predictions are all close to the mean of the labels.",
        hints=[
            "A model that cannot do better than the mean of y has inputs that say nothing.",
            "Does example i of a minibatch still have label i?",
        ],
        lesson="Labels that are permuted apart from their inputs look right one by one, in mean and"
        " in variance, and nothing can be learned from them.",
        test=SYNTHETIC
        + "test_regression_reaches_the_noise_variance_and_the_teacher[step_03_vector_linreg]",
    ),
    # ---------- 04_softmax_classify ----------
    Bug(
        step="04_softmax_classify",
        name="softmax before a loss that takes logits",
        original="    return -log_softmax(logits)[torch.arange(len(y)), y].mean()",
        planted="    return -log_softmax(logits.softmax(dim=1))[torch.arange(len(y)), y].mean()",
        flags="",
        symptom="The loss ends at 1.87 instead of 0.920, the entropy of the teacher. It still"
        " falls a little, but ever more slowly, and no learning rate brings it near the"
        " entropy.",
        hints=[
            "How small can this loss become for a model that is always right and certain?",
            "What does log_softmax expect, and what does it get?",
        ],
        lesson="Softmax applied twice squeezes the logits into 0 to 1: with C classes no"
        " probability can exceed e / (e + C - 1), and the gradients are tiny.",
        test=SYNTHETIC
        + "test_loss_is_cross_entropy_also_at_huge_logits[1-step_04_softmax_classify]",
    ),
    Bug(
        step="04_softmax_classify",
        name="an exponential that overflows",
        original="    logits = logits - logits.amax(dim=1, keepdim=True)  # softmax is the same;"
        " exp stays finite\n",
        planted="",
        flags="--learning_rate 100",
        symptom="With the default flags all is well. With --learning_rate 100 the run ends with"
        ' "the loss is no longer finite at iteration 100", although the docstring says'
        " that it gets worse, but never infinite. (Without the bug, its loss ends at"
        " 7.6.)",
        hints=[
            "What is the largest number whose exponential is finite in float32?",
            "Softmax does not change when the same number is subtracted from all logits.",
        ],
        lesson="exp overflows in float32 above 88: subtracting the largest logit first"
        " (log-sum-exp) gives the same softmax, and it never overflows.",
        test=SYNTHETIC
        + "test_loss_is_cross_entropy_also_at_huge_logits[10000.0-step_04_softmax_classify]",
    ),
    Bug(
        step="04_softmax_classify",
        name="minibatches in the order of the classes",
        original="        order = rng.permutation(len(x))\n",
        planted="        order = y.argsort()\n",
        flags="",
        symptom="The loss ends at 2.15, not far from the 2.30 of a model that knows nothing,"
        " instead of 0.920. On the way it rises as often as it falls.",
        hints=[
            "Print the labels of a few minibatches.",
            "What would the model learn from a minibatch with a single class?",
        ],
        lesson="Minibatches must be random samples of all classes: on data sorted by class, the"
        " model learns one class and forgets it with the next.",
        test=SYNTHETIC + "test_04_reaches_the_teachers_entropy",
    ),
    Bug(
        step="04_softmax_classify",
        name="labels that are no samples",
        original="    y = (log_p + torch.from_numpy(rng.gumbel(size=log_p.shape))).argmax(dim=1)",
        planted="    y = log_p.argmax(dim=1)",
        flags="",
        symptom="The training loss ends at 0.254. The entropy of the teacher, said to be the"
        " lowest loss to expect, is 0.920. What is wrong with the theory?",
        hints=[
            "How can a model's loss be lower than the entropy of the labels?",
            "How often does the teacher's second most likely class occur among the labels?",
        ],
        lesson="The argmax of a distribution is not a sample from it: the labels lost their"
        " randomness, so that the entropy is no longer the lowest loss to expect.",
        test=SYNTHETIC
        + "test_labels_are_samples_of_the_teachers_distribution[step_04_softmax_classify]",
    ),
    # ---------- 05_mlp_manual ----------
    Bug(
        step="05_mlp_manual",
        name="a standard deviation of 2/n instead of sqrt(2/n)",
        original="        w = rng.normal(scale=math.sqrt(2 / n_in), size=(n_in, args.n_hidden))",
        planted="        w = rng.normal(scale=2 / n_in, size=(n_in, args.n_hidden))",
        flags="--n_layer 4",
        symptom="With --n_layer 4 the loss is still 2.20 at iteration 1000 and ends at 1.51,"
        " where 0.749 was to be expected. The network seems to sleep at first.",
        hints=[
            "Print the mean square of the activations after every hidden layer at iteration 0.",
            "The variance of the weights is to be 2 / n. What does rng.normal call its scale?",
        ],
        lesson="scale is a standard deviation: with weights that are too small, activations and"
        " gradients shrink with every layer, and deep networks hardly begin to learn.",
        test=SYNTHETIC
        + "test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero[step_05_mlp_manual]",
    ),
    Bug(
        step="05_mlp_manual",
        name="hidden layers without a nonlinearity",
        original='        x = relu(x @ params[f"w{i}"] + params[f"b{i}"])  # (B, n_hidden)',
        planted='        x = x @ params[f"w{i}"] + params[f"b{i}"]  # (B, n_hidden)',
        flags="",
        symptom="The two models end almost at the same loss, 1.64 with hidden layers and 1.61"
        " without. With hidden layers it should be 0.718. What are the hidden layers"
        " good for?",
        hints=[
            "Two models that end at the same loss may be the same function.",
            "What is a linear map of a linear map?",
        ],
        lesson="Without a nonlinearity between them, any number of linear layers is one linear"
        " layer.",
        test=SYNTHETIC + "test_05_trains_the_mlp_and_the_linear_model_alongside",
    ),
    Bug(
        step="05_mlp_manual",
        name="hidden units that start equal",
        original="        w = rng.normal(scale=math.sqrt(2 / n_in), size=(n_in, args.n_hidden))",
        planted="        w = rng.normal(scale=math.sqrt(2 / n_in), size=(n_in, 1))"
        " * np.ones(args.n_hidden)",
        flags="",
        symptom="The loss with 128 units per layer ends at 2.21, worse than that of the linear"
        " model, 1.61; it should be 0.718. Do all these units do anything?",
        hints=[
            "How many different activations does a hidden layer have for one example?",
            "Look at two columns of w0 before and after training.",
        ],
        lesson="Units with equal weights have equal gradients, and stay equal: random weights break"
        " the symmetry, or the layer is no better than a single unit.",
        test=SYNTHETIC
        + "test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero[step_05_mlp_manual]",
    ),
    Bug(
        step="05_mlp_manual",
        name="a line that was copied and not quite adapted",
        original='record["linear_loss"] = loss_fn(forward(linear, x_train), y_train)',
        planted='record["linear_loss"] = loss_fn(forward(params, x_train), y_train)',
        flags="",
        symptom="linear_loss and train_loss are the same number at every evaluation, 0.71788 at"
        " the end. How can a linear model be as good as the network?",
        hints=[
            "Two curves that agree in every digit are one curve.",
            "Which model does each line of the evaluation evaluate?",
        ],
        lesson="When two results are identical to the last digit, suspect the measurement before"
        " the model: a line that was copied still named the first one.",
        test=SYNTHETIC + "test_05_trains_the_mlp_and_the_linear_model_alongside",
    ),
    # ---------- 06_mlp_nn ----------
    Bug(
        step="06_mlp_nn",
        name="gradients zeroed after they were computed",
        original="        optimizer.zero_grad()\n        loss.backward()\n",
        planted="        loss.backward()\n        optimizer.zero_grad()\n",
        flags="",
        symptom="The network does not learn at all: its loss is 2.3026 = log(10) at every"
        " evaluation. The linear model beside it learns, and reaches 1.61. No learning"
        " rate helps.",
        hints=[
            "Print the gradient norm of the model just before optimizer.step().",
            "In which order must zero_grad, backward and step be called?",
        ],
        lesson="zero_grad belongs before backward or after step; between the two it erases the"
        " gradients that step needs, without any error.",
        test=SYNTHETIC + "test_06_trains_the_mlp_and_the_linear_model_alongside",
    ),
    Bug(
        step="06_mlp_nn",
        name="layers in a plain list",
        original="        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in"
        " pairwise(sizes))",
        planted="        self.hidden = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes)]",
        flags="",
        symptom="The network ends at 1.51, little better than the linear model with 1.61; it"
        " should end at 0.738. print(model) shows fewer layers than I expected.",
        hints=[
            "Count the model's parameters: print(model). Are these all of its layers?",
            "How does nn.Module find out which layers belong to it?",
        ],
        lesson="nn.Module registers modules and nn.ModuleList, not the content of a Python list:"
        " those layers run, but the optimizer, .to(device) and state_dict never see them.",
        test=SYNTHETIC
        + "test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero[step_06_mlp_nn]",
    ),
    Bug(
        step="06_mlp_nn",
        name="softmax before a loss that takes logits",
        original="        return self.out(x)  # (B, C)",
        planted="        return self.out(x).softmax(dim=1)  # (B, C)",
        flags="",
        symptom="Both models learn slowly and end at high losses: 1.96 with hidden layers"
        " (0.738 was to be expected) and 2.01 without (1.61).",
        hints=[
            "What is the lowest loss that a model can reach whose outputs lie between 0 and 1?",
            "F.cross_entropy applies a function of its own to the outputs of the model first.",
        ],
        lesson="F.cross_entropy contains log_softmax and takes logits; a softmax layer before it"
        " trains, slowly, and to a loss that is far too high.",
        test=SYNTHETIC + "test_06_with_05s_weights_has_05s_logits_and_gradients",
    ),
    Bug(
        step="06_mlp_nn",
        name="no shuffling",
        original="    loader = DataLoader(dataset, batch_size, shuffle=True)",
        planted="    loader = DataLoader(dataset, batch_size)",
        flags="--n_examples 1000",
        symptom="I printed the first labels of every minibatch: with 1,000 examples, they"
        " repeat in every epoch, in the same order. Here the loss hardly suffers, but on"
        " sorted data it would.",
        hints=[
            "What does a DataLoader do if it is told nothing about the order?",
        ],
        lesson="A DataLoader does not shuffle unless it is asked to: training then sees the same"
        " minibatches in the same order in every epoch, and sorted data would ruin it.",
        test=SYNTHETIC + "test_every_epoch_shows_each_example_once_with_its_own_label"
        "[step_06_mlp_nn-4-sizes1]",
    ),
]
