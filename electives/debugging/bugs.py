"""The bugs that play.py plants. Spoilers: find the bugs before you read on."""

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
        name="a mean that is divided a second time",
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
        name="a parameter that is left out of the update",
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
        lesson="A loss that still falls steeply at the end was trained too slowly: the"
        " learning rate is the first hyperparameter to try, in powers of ten.",
        test=SYNTHETIC
        + "test_regression_reaches_the_noise_variance_and_the_teacher[step_03_vector_linreg]",
    ),
    Bug(
        step="03_vector_linreg",
        name="the absolute error in place of the squared one",
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
        symptom="The loss fluctuates, and ends at 177 instead of 0.251, where it began at 214."
        " The bias is learned, the weights are not.",
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
        " where 0.749 was to be expected. At first the network hardly learns at all.",
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
        name="a copied line that still names the other model",
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
    # ---------- 07_mnist_mlp ----------
    Bug(
        step="07_mnist_mlp",
        name="dropout in evaluation",
        original="    model.eval()  # no dropout\n",
        planted="",
        flags="--max_iters 300 --eval_interval 300",
        symptom="After 300 iterations the test accuracy is 93.6% instead of 95.6%, and the"
        " training accuracy 93.8% instead of 96.0%. Every evaluation of one and the same"
        " model gives a slightly other loss. I trained exactly as the step does.",
        hints=[
            "Call evaluate twice on the same model: is the loss the same?",
            "Which layers behave differently in training and in evaluation, and what tells them?",
        ],
        lesson="model.eval() switches dropout off; without it a part of the units is missing when"
        " the model is measured, and the measurement is random.",
        test=MNIST
        + "test_evaluation_measures_all_examples_in_chunks_and_without_a_graph[step_07_mnist_mlp]",
    ),
    Bug(
        step="07_mnist_mlp",
        name="evaluation mode during training",
        original="    model.train()\n    accuracy",
        planted="    accuracy",
        flags="--max_iters 300 --eval_interval 300",
        symptom="--dropout has no effect at all: every run gives the same losses, whatever its"
        " value. After 300 iterations the training loss is 0.117, lower than the 0.136"
        " that dropout leads to; so it will overfit sooner, too.",
        hints=[
            "Compare with --dropout 0: is there a difference at all?",
            "In which mode is the model when evaluate has returned?",
        ],
        lesson="model.eval() stays in force until model.train() is called: an evaluation that"
        " leaves the model in evaluation mode switches dropout off for the rest of the training.",
        test=MNIST
        + "test_evaluation_measures_all_examples_in_chunks_and_without_a_graph[step_07_mnist_mlp]",
    ),
    Bug(
        step="07_mnist_mlp",
        name="preprocessing of the training images only",
        original="    return [TensorDataset((x - mean) / std, y) for x, y in datasets]",
        planted="    (x, y), test = datasets\n"
        "    return [TensorDataset((x - mean) / std, y), TensorDataset(*test)]",
        flags="--max_iters 300 --eval_interval 300",
        symptom="The training loss after 300 iterations is right (0.136), but the test loss is"
        " 0.729 instead of 0.148, and the test accuracy 93.1% instead of 95.6%. That is"
        " a lot of overfitting for so few iterations. Or is it overfitting?",
        hints=[
            "Overfitting, or other data? Evaluate the training images as if they were test images.",
            "Print the mean and the standard deviation of the pixels in both data sets.",
        ],
        lesson="Whatever is done to the training inputs must be done to the test inputs, with the"
        " training set's statistics: else the model is tested on data that it has never met.",
        test=MNIST
        + "test_pixels_are_normalized_with_the_training_sets_statistics[step_07_mnist_mlp]",
    ),
    Bug(
        step="07_mnist_mlp",
        name="(N,) compared with (N, 1)",
        original="    accuracy = (logits.argmax(dim=1) == y).float()",
        planted="    accuracy = (logits.argmax(dim=1) == y[:, None]).float()",
        flags="--max_iters 300 --eval_interval 300",
        symptom="The loss falls as it should, from 2.30 to 0.136, but both accuracies stay at"
        " 10.0%, on training and on test images: as if the model chose at random.",
        hints=[
            "The loss says that the model learns. Compute the accuracy by hand for five images.",
            "Print the shape of the comparison whose mean is taken.",
        ],
        lesson="Comparing (N,) with (N, 1) compares every prediction with every label: the mean of"
        " the (N, N) matrix is chance, however good the model is.",
        test=MNIST
        + "test_evaluation_measures_all_examples_in_chunks_and_without_a_graph[step_07_mnist_mlp]",
    ),
    # ---------- 08_mnist_adam ----------
    Bug(
        step="08_mnist_adam",
        name="optimizer state that is lost at every update",
        original="        params, self.state = self.update(params, grads, self.state)",
        planted="        params, _ = self.update(params, grads, self.state)",
        flags="--max_iters 300 --eval_interval 300",
        symptom="The loss is 2.3026 = log(10) at every evaluation. Nothing is learned at all,"
        " although gradients arrive, and the learning rate that is recorded rises and"
        " falls as it should.",
        hints=[
            "Print the first weight before and after an update. Then print optimizer.state.",
            "An optax optimizer is a pure function: where does its next state go?",
        ],
        lesson="In a functional optimizer the state is an argument and a result: if the result is"
        " dropped, every update is the first one, with the learning rate at the start of the"
        " warm-up.",
        test=MNIST + "test_08_optimizer_state_survives_from_update_to_update",
    ),
    Bug(
        step="08_mnist_adam",
        name="an assignment to the loop variable",
        original="            p.data = torch.from_dlpack(new)",
        planted="            p = torch.from_dlpack(new)",
        flags="--max_iters 300 --eval_interval 300",
        symptom="The loss is 2.3026 = log(10) at every evaluation, with any learning rate, with"
        " any transformation of optax that I put in the place of Adam.",
        hints=[
            "The updates are computed. Do they arrive in the model?",
            "In Python, what does an assignment to the variable of a for loop change?",
        ],
        lesson="p = ... only binds the name p to another tensor; p.data = ... (or an operation in"
        " place) changes the parameter that the model uses.",
        test=MNIST + "test_08_ten_optax_updates_equal_torch_adams",
    ),
    Bug(
        step="08_mnist_adam",
        name="a schedule ten times too long",
        original="(0, args.learning_rate, warmup, args.max_iters)",
        planted="(0, args.learning_rate, warmup, 10 * args.max_iters)",
        flags="--max_iters 300 --eval_interval 300",
        symptom="After 300 iterations the test loss is 0.166 instead of 0.126. The learning"
        " rate in metrics.jsonl is 0.0020 at the end, still the peak, where I expected"
        " 0.",
        hints=[
            "Draw the learning rate that the run records. Is it what the docstring promises?",
            "When does the cosine reach 0?",
        ],
        lesson="A cosine decay must reach its end with the last update; a schedule made for another"
        " number of iterations never comes to the small learning rates that average out the noise.",
        test=MNIST + "test_training_is_that_of_pytorchs_optimizer[step_08_mnist_adam]",
    ),
    Bug(
        step="08_mnist_adam",
        name="gradients not zeroed",
        original="        optimizer.zero_grad()\n",
        planted="",
        flags="--max_iters 300 --eval_interval 300",
        symptom="After 300 iterations the loss is 1.94 instead of 0.120, and the accuracy 29%"
        " instead of 96%. Adam is known to be robust, so why not here?",
        hints=[
            "Print the gradient norm in every iteration: does it behave as the loss does?",
            "What does backward do with a gradient that is there already?",
        ],
        lesson="backward adds to .grad: without zero_grad every update follows the sum of all"
        " gradients so far. Adam divides by their size, but their direction is out of"
        " date.",
        test=MNIST + "test_training_is_that_of_pytorchs_optimizer[step_08_mnist_adam]",
    ),
    # ---------- 09_mnist_convnet ----------
    Bug(
        step="09_mnist_convnet",
        name="a shift along the wrong dimension",
        original="    return x.roll((dy, dx), dims=(2, 3))",
        planted="    return x.roll((dy, dx), dims=(0, 3))",
        flags="--max_iters 100 --eval_interval 100",
        symptom="After 100 iterations the test loss is 2.27 instead of 0.235, and the test"
        " accuracy 38.8% instead of 92.9%. --shift 0 cures it. I thought that"
        " augmentation was to help.",
        hints=[
            "Does --shift 0 help? Then draw a minibatch after augment, with its labels.",
            "What are the four dimensions of x, and which of them may be moved?",
        ],
        lesson="Rolled along the batch, image i meets the label of its neighbor: augmentation may"
        " change an input in any way that keeps its label right, and in no other.",
        test=MNIST + "test_augmentation_moves_digits_by_at_most_shift[step_09_mnist_convnet]",
    ),
    Bug(
        step="09_mnist_convnet",
        name="dropout that ignores evaluation mode",
        original="x = self.dropout(F.relu(self.hidden(x.flatten(1))))",
        planted="x = F.dropout(F.relu(self.hidden(x.flatten(1))), self.dropout.p)",
        flags="--max_iters 100 --eval_interval 100",
        symptom="After 100 iterations the test loss is 0.273 instead of 0.235, and two"
        " evaluations of the same model differ. Yet evaluate calls model.eval(), and the"
        " model has its dropout layer.",
        hints=[
            "model.eval() is called. Which layers listen to it?",
            "Look up the signature of the function that drops units here.",
        ],
        lesson="F.dropout is a function: it does not know the mode of the model, and drops units"
        " unless it is told training=False. The module nn.Dropout follows model.eval().",
        test="test_bugs.py::test_09_dropout_is_on_in_training_only",
    ),
    Bug(
        step="09_mnist_convnet",
        name="a layer that starts at zero",
        original="        for layer in (self.conv_1, self.conv_2, self.hidden):",
        planted="        for layer in (self.conv_1, self.hidden):",
        flags="--max_iters 100 --eval_interval 100",
        symptom="The network does not learn to tell the digits apart: after 100 iterations the"
        " loss is 2.302 instead of 0.235, and the test accuracy 11.35%, the share of the"
        " digit 1 among the test images.",
        hints=[
            "Print the gradient norm of every parameter after the first backward pass.",
            "What comes out of a layer with weights 0, and what is ReLU's gradient there?",
        ],
        lesson="A layer of zeros in the middle outputs nothing and passes no gradient on: only the"
        " output bias learns, that is, how frequent each class is.",
        test=MNIST + "test_weights_have_variance_2_over_n_and_all_else_is_zero"
        "[step_09_mnist_convnet]",
    ),
    Bug(
        step="09_mnist_convnet",
        name="a result that is not used",
        original="        logits = model(augment(x, args.shift))",
        planted="        augment(x, args.shift)\n        logits = model(x)",
        flags="--max_iters 100 --eval_interval 100",
        symptom="After 100 iterations the training loss is 0.189 instead of 0.253. That is"
        " better, but --shift has no effect: the losses hardly differ between 0 and 5"
        " pixels. What does the flag do?",
        hints=[
            "Does --shift 5 change anything in the losses?",
            "Does augment change x, or does it return something new?",
        ],
        lesson="augment returns new images and leaves x as it is: most functions of PyTorch work so"
        " (only names that end in _ work in place), and an unused result is no error.",
        test=MNIST + "test_training_is_that_of_pytorchs_optimizer[step_09_mnist_convnet]",
    ),
    Bug(
        step="09_mnist_convnet",
        name="augmentation in evaluation",
        original="    logits = torch.cat([model(chunk) for chunk in x.split(200)])",
        planted="    logits = torch.cat([model(augment(chunk, 2)) for chunk in x.split(200)])",
        flags="--max_iters 100 --eval_interval 100",
        symptom="After 100 iterations the test loss is 0.373 instead of 0.235, and the test"
        " accuracy 88.7% instead of 92.9%. Two evaluations of the same model differ,"
        " although dropout is off.",
        hints=[
            "Is an evaluation of the same model twice the same?",
            "What happens to a test image before the model sees it?",
        ],
        lesson="Random augmentation belongs to training: in evaluation it makes the result random,"
        " and other than that of the images that were to be classified.",
        test=MNIST + "test_training_is_that_of_pytorchs_optimizer[step_09_mnist_convnet]",
    ),
    # ---------- 10_mnist_resnet ----------
    Bug(
        step="10_mnist_resnet",
        name="batch statistics in evaluation",
        original="    model.eval()  # batch norm: running averages, so that an image's logits"
        " depend on it alone\n",
        planted="",
        flags="--max_iters 100 --eval_interval 100 --n_channel 4",
        symptom="The test loss depends on which images are evaluated together: sorting the test"
        " images by class changes it. And the model's state_dict is another one after"
        " every evaluation.",
        hints=[
            "Evaluate one image alone, and the same image among others.",
            "Where do the mean and the variance in batch norm come from, in training and in"
            " evaluation?",
        ],
        lesson="In training mode batch norm uses the statistics of the images that happen to be in"
        " the same chunk, and changes its running averages: the test data leak into the model.",
        test=MNIST + "test_10_evaluation_uses_running_statistics_and_leaves_them",
    ),
    Bug(
        step="10_mnist_resnet",
        name="evaluation mode during training",
        original="    model.train()\n    accuracy",
        planted="    accuracy",
        flags="--max_iters 100 --eval_interval 100 --n_channel 4",
        symptom="With 4 channels and 100 iterations the test loss is 1.65 instead of 1.15, and"
        " the test accuracy 35.0% instead of 69.0%. The minibatches, augmentation and"
        " learning rates are those of the step.",
        hints=[
            "Print model.training in the loop.",
            "What do the running averages of batch norm look like after 100 iterations?",
        ],
        lesson="After the first evaluation batch norm went on with its initial running averages, 0"
        " and 1: it normalized nothing. model.train() belongs at the end of every evaluation.",
        test=MNIST + "test_evaluation_measures_all_examples_in_chunks_and_without_a_graph"
        "[step_10_mnist_resnet]",
    ),
    Bug(
        step="10_mnist_resnet",
        name="the wrong scale starts at zero",
        original="        nn.init.zeros_(self.bn_2.weight)  # scale 0",
        planted="        nn.init.zeros_(self.bn_1.weight)  # scale 0",
        flags="--max_iters 100 --eval_interval 100 --n_channel 4",
        symptom="With 4 channels and 100 iterations the test loss is 2.03 instead of 1.15, and"
        " the test accuracy 26.7% instead of 69.0%. Many parameters have a gradient of"
        " exactly 0 in every iteration, as if most of each block did not exist.",
        hints=[
            "Print the gradient norm of every parameter of a block: which ones are exactly 0?",
            "What comes out of ReLU, and what gradient goes back through it, if its input is 0?",
        ],
        lesson="A zero scale before a ReLU is dead for good, since the gradient of ReLU is 0 there;"
        " the last scale of a block may be zero, since nothing follows it but the sum.",
        test=MNIST + "test_10_block_with_zero_last_scale_is_its_shortcut",
    ),
    Bug(
        step="10_mnist_resnet",
        name="validation on training data",
        original='evaluate(model, test_set, "test")',
        planted='evaluate(model, train_eval, "test")',
        flags="--max_iters 100 --eval_interval 100 --n_channel 4",
        symptom="The training accuracy and the test accuracy are equal to the last digit, at"
        " every evaluation, and so are the two losses. Generalization is perfect!",
        hints=[
            "When are two measurements equal to the last digit?",
            "Follow the test images from load_data to the place where they are used.",
        ],
        lesson="A test result that equals the training result was measured on the training data:"
        " it says nothing about generalization.",
        test=MNIST + "test_training_is_that_of_pytorchs_optimizer[step_10_mnist_resnet]",
    ),
    # ---------- 11_shakespeare_ffn ----------
    Bug(
        step="11_shakespeare_ffn",
        name="a context that contains the target",
        original="    return TensorDataset(chunks[:, :-1], chunks[:, -1])",
        planted="    return TensorDataset(chunks[:, 1:], chunks[:, -1])",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="The test loss after 200 iterations is 3.14 instead of 5.03, and it goes on"
        " falling quickly. At this rate I will beat every published model of this size."
        " Should I be glad?",
        hints=[
            "A result that is far too good is a bug until you can explain it.",
            "Let ids be 0, 1, 2, ... and print the first window and its target.",
        ],
        lesson="Off by one: the last word of the context was the word to predict, and the model"
        " learned to copy it. Write down one small example of every slice.",
        test=WORDS + "test_target_is_the_word_after_the_window",
    ),
    Bug(
        step="11_shakespeare_ffn",
        name="a vocabulary that includes the test text",
        original="    counts = Counter(train_words)",
        planted="    counts = Counter(train_words + test_words)",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="The vocabulary has 7,611 words, where 7,115 is known. 2.4% of the test words"
        " are <unk> instead of 6.0%, and the losses cannot be compared with anybody's:"
        " after 200 iterations the test loss is 5.43 instead of 5.03.",
        hints=[
            "Nothing that is computed from the test text may reach the model. What is computed"
            " before training begins?",
            "How many of the test words are <unk>, and which words do not occur in the training"
            " text at all?",
        ],
        lesson="The vocabulary is learned from data, too: with the test text in it, the model's"
        " size and the share of <unk> depend on what was to be unknown: no result is comparable.",
        test=WORDS + "test_vocabulary_comes_from_the_training_part_only[11_shakespeare_ffn]",
    ),
    Bug(
        step="11_shakespeare_ffn",
        name="a loss averaged over batches instead of words",
        original='        loss += F.cross_entropy(model(x), y, reduction="sum").item()\n'
        "    model.train()\n"
        '    return {f"{name}_loss": loss / len(dataset)}',
        planted="        loss += F.cross_entropy(model(x), y).item()\n"
        "    model.train()\n"
        '    return {f"{name}_loss": loss / math.ceil(len(dataset) / 512)}',
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="The test loss changes a little when I change the 512 in evaluate, which is"
        " only there to save memory: after 200 iterations it is 5.0344, where others get"
        " 5.0337. Is that rounding?",
        hints=[
            "How many words are there in each chunk of the evaluation, and how many in the last?",
            "What is the weight of a single word in the mean, in the first chunk and in the last?",
        ],
        lesson="A mean of means weighs the words of a smaller last batch more: sum over the words,"
        " and divide once by their number.",
        test=WORDS
        + "test_evaluation_is_the_mean_over_words_however_they_are_batched[11_shakespeare_ffn]",
    ),
    Bug(
        step="11_shakespeare_ffn",
        name="weight decay on norms and biases",
        original="    matrices = [p.ndim == 2 for p in model.parameters()]",
        planted="    matrices = [p.ndim > 0 for p in model.parameters()]",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="The losses end higher than they should: after 200 iterations the test loss is"
        " 5.050 instead of 5.034. The more weight decay I use, the more the model seems"
        " to forget how often each word occurs.",
        hints=[
            "Compare with --weight_decay 0: which parameters should decay, and which should not?",
            "The output bias starts at the log frequencies of the words. What is it at the end?",
        ],
        lesson="Weight decay pulls to 0. That is right for matrices; a layer norm's scale belongs"
        " near 1, and the output bias near the log frequencies of the words.",
        test=WORDS
        + "test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices[11_shakespeare_ffn]",
    ),
    # ---------- 12_sampling ----------
    Bug(
        step="12_sampling",
        name="a temperature that works the wrong way round",
        original="        p = (logits / args.temperature).softmax(dim=1)",
        planted="        p = (logits * args.temperature).softmax(dim=1)",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100 --temperature 0.1",
        symptom="--temperature 0.1 gives nonsense, as if every word were equally likely, and"
        " --temperature 10 gives the same few words again and again. Did I misread the"
        " docstring?",
        hints=[
            "Compare samples with --temperature 0.1 and with --temperature 10.",
            "By what must logits be divided or multiplied for their differences to grow?",
        ],
        lesson="Logits are divided by the temperature: below 1 their differences grow, and the"
        " distribution sharpens.",
        test=WORDS + "test_temperature_sets_the_odds",
    ),
    Bug(
        step="12_sampling",
        name="top-k with the threshold of the most likely",
        original=".values[:, -1:]  # (1, 1)",
        planted=".values[:, :1]  # (1, 1)",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="The sample after 200 iterations is almost nothing but commas, and"
        " --temperature changes nothing. With --top_k 0 the samples are varied.",
        hints=[
            "Does --top_k 0 help? And does it matter which other k it is?",
            "topk returns its values in decreasing order. Which one is the k-th?",
        ],
        lesson="The threshold of top-k sampling is the k-th largest logit, the last of topk's"
        " values; with the first, only the most likely word is left, whatever k is.",
        test=WORDS + "test_top_k_samples_only_from_the_k_most_likely",
    ),
    Bug(
        step="12_sampling",
        name="samples that take random numbers from training",
        original="torch.multinomial(p, 1, generator=generator)",
        planted="torch.multinomial(p, 1)",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="Step 12 is said to have step 11's losses, as sampling has random numbers of"
        " its own. Mine differ from step 11's, and they also depend on --max_new_tokens.",
        hints=[
            "Compare the losses with --max_new_tokens 0 and with 100: where do they part?",
            "Which random number generator do dropout and shuffling use, and which one does"
            " sampling?",
        ],
        lesson="Whatever draws from the global generator changes all random numbers after it: what"
        " only watches the training needs a generator of its own.",
        test=WORDS
        + "test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices[12_sampling]",
    ),
    Bug(
        step="12_sampling",
        name="evaluation mode during training",
        original="    model.train()\n    return ids",
        planted="    return ids",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="--dropout has no effect: with 0, 0.4 and 0.9 the losses are the same in every"
        " digit. After 200 iterations the training loss is 5.06, where dropout leads to"
        " 5.29.",
        hints=[
            "Compare with --dropout 0.",
            "In which mode does each function leave the model that it was given?",
        ],
        lesson="Sampling switches to evaluation mode and has to switch back: else everything that"
        " comes after the first sample is trained without dropout.",
        test=WORDS
        + "test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices[12_sampling]",
    ),
    Bug(
        step="12_sampling",
        name="a class that must never be sampled",
        original="        logits[:, 0] = -math.inf  # never sample <unk>\n",
        planted="",
        flags="--n_embd 32 --n_hidden 64 --max_iters 200 --eval_interval 100",
        symptom="Now and then the samples contain <unk>, although the generator is said never"
        " to write it.",
        hints=[
            "Which entries of the vocabulary are not words to write?",
            "How can a class get probability 0, whatever the model predicts?",
        ],
        lesson="A class that must not be written is masked out before softmax, with a logit of"
        " minus infinity.",
        test=WORDS + "test_unknown_is_never_written",
    ),
    # ---------- 13_transformer ----------
    Bug(
        step="13_transformer",
        name="a causal mask that is off by one",
        original=".tril()  # position t sees",
        planted=".tril(1)  # position t sees",
        flags="--n_embd 32 --n_layer 1 --max_iters 200 --eval_interval 100",
        symptom="After 200 iterations the test loss is 3.89 instead of 5.01: a perplexity of"
        " 49, when the whole run is known to reach 59. But the samples are little more"
        " than empty lines.",
        hints=[
            "Change the last word of a window: which logits change?",
            "Print the mask for T = 4. What is at position t + 1 of the window?",
        ],
        lesson="With the diagonal one too high, every position sees the next word, which is its"
        " target. The loss looks wonderful, and the samples show that nothing was learned.",
        test=WORDS + "test_later_words_never_change_earlier_logits",
    ),
    Bug(
        step="13_transformer",
        name="scores without their scale",
        original="        scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)",
        planted="        scores = q @ k.mT  # (B, H, T, T)",
        flags="--n_embd 32 --n_layer 1 --max_iters 200 --eval_interval 100",
        symptom="After 200 iterations the test loss is 5.022 instead of 5.012. With the same"
        " weights the model gives other logits than PyTorch's own layers do, and the"
        " difference grows with the size of a head, n_embd / n_head.",
        hints=[
            "Compare the layer with F.scaled_dot_product_attention, with the same weights.",
            "What is the variance of a dot product of two random vectors of length D?",
        ],
        lesson="Dot products of vectors of length D have a standard deviation of sqrt(D):"
        " undivided, softmax saturates, and the gradients through it vanish.",
        test=WORDS + "test_written_out_attention_equals_sdpa",
    ),
    Bug(
        step="13_transformer",
        name="heads put together wrongly",
        original="        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)",
        planted="        return self.c_proj(y.reshape(B, T, C))  # (B, T, C)",
        flags="--n_embd 32 --n_layer 1 --max_iters 200 --eval_interval 100",
        symptom="After 200 iterations the test loss is 5.0132 instead of 5.0123, which might be"
        " chance. But a later word changes earlier logits, and the mask is right: I"
        " printed it.",
        hints=[
            "The mask is right, and yet a later word changes earlier logits. Which operation after"
            " the softmax mixes positions?",
            "y is (B, H, T, D) and becomes (B, T, C): in which order do its numbers lie in memory?",
        ],
        lesson="reshape keeps the order in memory: from (B, H, T, D) to (B, T, H * D) the"
        " dimensions have to be transposed first, or positions and heads are mixed, the future"
        " included.",
        test=WORDS + "test_written_out_attention_equals_sdpa",
    ),
    Bug(
        step="13_transformer",
        name="one position embedding for all positions",
        original="self.wpe.weight[: x.shape[1]])  # (B, T, C)",
        planted="self.wpe.weight[:1])  # (B, T, C)",
        flags="--n_embd 32 --n_layer 1 --max_iters 200 --eval_interval 100",
        symptom="The model seems to know which words go together, but not in which order: in a"
        " model with one block, shuffling the earlier words of the context leaves the"
        " prediction as it is.",
        hints=[
            "Swap two earlier words: do the last logits change, in a model with one block?",
            "What shape do the position embeddings have that are added here?",
        ],
        lesson="A weighted mean ignores order, so the positions must be added to the embeddings;"
        " one row, broadcast to all positions, says nothing.",
        test=WORDS + "test_the_order_of_the_words_matters",
    ),
    Bug(
        step="13_transformer",
        name="words that are scored with little context, and more than once",
        original="    targets[:, : -args.eval_stride] = -100\n",
        planted="",
        flags="--n_embd 32 --n_layer 1 --max_iters 200 --eval_interval 100",
        symptom="After 200 iterations the test loss is 5.0070 instead of 5.0123, although"
        " training and samples are the same in every digit. With --eval_stride equal to"
        " --block_size it is right.",
        hints=[
            "Over how many words is the mean taken, and how many are there in the test text?",
            "Evaluation windows overlap. Which of their targets may count?",
        ],
        lesson="In sliding-window evaluation only the last eval_stride targets of a window count:"
        " the others have been scored before, and here they have less context.",
        test=WORDS + "test_sliding_window_evaluation_is_the_mean_over_words",
    ),
    # ---------- 14_resnet_gpu ----------
    Bug(
        step="14_resnet_gpu",
        name="images shuffled, their labels not",
        original="y[chunk].split(args.batch_size))",
        planted="y.split(args.batch_size))",
        flags="--max_iters 60 --n_channel 4",
        symptom="With 4 channels and 60 iterations the test loss is 2.302, hardly below log(10)"
        " = 2.303, instead of 0.474, and the test accuracy 10.1% instead of 89.9%. I"
        " looked at the images, and they are fine.",
        hints=[
            "Draw a minibatch with its labels.",
            "Which indices choose the images, and which ones choose the labels?",
        ],
        lesson="Images and labels have to be indexed by the same permutation; a loss that"
        " stays close to log(10) is the sign of labels without a relation to their images.",
        test="test_14_resnet_gpu.py::"
        "test_an_epoch_shows_every_image_once_and_the_next_in_another_order",
    ),
    Bug(
        step="14_resnet_gpu",
        name="pixels on another scale in evaluation",
        original="    chunks = [normalize(chunk / 255, stats) for chunk in x.split(1000)]",
        planted="    chunks = [normalize(chunk, stats) for chunk in x.split(1000)]",
        flags="--max_iters 60 --n_channel 4",
        symptom="With 4 channels and 60 iterations the test loss is 669 instead of 0.474, and"
        " the test accuracy 27.1% instead of 89.9%; on the training images it is much"
        " the same. The loss of the minibatches, where I print it, falls as it should.",
        hints=[
            "The loss on the training images is as bad as that on the test images. Is it also bad"
            " for the minibatches?",
            "Print the mean and the standard deviation of what the model gets, in training and in"
            " evaluation.",
        ],
        lesson="Training and evaluation must preprocess alike: here one had pixels from 0 to 1 and"
        " the other from 0 to 255.",
        test="test_14_resnet_gpu.py::test_evaluation_is_the_mean_over_views_of_every_image",
    ),
    Bug(
        step="14_resnet_gpu",
        name="a sum where a mean was meant",
        original="    logits /= len(VIEWS)  # (N, C)\n",
        planted="",
        flags="--max_iters 60 --n_channel 4",
        symptom="The accuracies are right in every digit, but the losses are not: with 4"
        " channels the test loss is 2.83 instead of 2.32 at iteration 0, and 0.525"
        " instead of 0.474 after 60 iterations.",
        hints=[
            "Which change of the logits leaves every argmax alone, but not the loss?",
            "Is the model as certain as its logits say? Follow them through the views.",
        ],
        lesson="Logits that are five times too large have the same argmax, but the probabilities of"
        " a model that is far too certain: look at the loss and at the accuracy.",
        test="test_14_resnet_gpu.py::test_evaluation_is_the_mean_over_views_of_every_image",
    ),
    Bug(
        step="14_resnet_gpu",
        name="a wait for the GPU in every iteration",
        original='        clock.mark("update")\n',
        planted='        clock.mark("update")\n'
        '        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)\n',
        flags="--max_iters 60 --n_channel 4",
        symptom="On a GPU the run takes longer than it should. The table of times looks"
        " harmless, and the metrics are right in every digit. On a CPU I see no"
        " difference.",
        hints=[
            "A GPU runs asynchronously: what makes the CPU wait for it?",
            "Which lines of the loop need a number from the device?",
        ],
        lesson=".item(), printing and comparing make the CPU wait until the GPU has computed the"
        " value; meanwhile no new kernels are launched, and the GPU soon waits, too.",
        test="test_14_resnet_gpu.py::test_nothing_in_the_loop_waits_for_the_device",
    ),
    Bug(
        step="14_resnet_gpu",
        name="no reshuffling",
        original="    while True:\n        order = torch.randperm(len(x), device=x.device)[:n]\n",
        planted="    order = torch.randperm(len(x), device=x.device)[:n]\n    while True:\n",
        flags="--max_iters 60 --n_channel 4",
        symptom="The metrics look normal. But I printed the labels of the minibatches, and they"
        " repeat in every epoch; and some training images are never used at all.",
        hints=[
            "Which images does an epoch leave out, and are they the same ones in every epoch?",
            "How often is a permutation drawn?",
        ],
        lesson="Drawn once before the loop, the permutation repeats in every epoch, and the images"
        " of the incomplete last minibatch are never seen.",
        test="test_14_resnet_gpu.py::"
        "test_an_epoch_shows_every_image_once_and_the_next_in_another_order",
    ),
    # ---------- 15_imagenet ----------
    Bug(
        step="15_imagenet",
        name="weight decay on norms and biases",
        original='if p.ndim == 1], "weight_decay": 0.0},',
        planted="if p.ndim == 1]},",
        flags="--recipe tiny",
        symptom="Training works, but the scales of the batch norms shrink, the faster the"
        " larger --weight_decay is. The docstring of make_optimizer promises something"
        " else.",
        hints=[
            "Print the groups of the optimizer: which hyperparameters differ between them?",
            "To which value does weight decay pull the scale of a batch norm?",
        ],
        lesson="Weight decay is for the weights of convolutions and linear layers; the scales and"
        " biases of norms are few, and pulling them to 0 only distorts what they normalize.",
        test="test_15_imagenet.py::test_norms_and_biases_do_not_decay",
    ),
    Bug(
        step="15_imagenet",
        name="the same order and the same crops in every epoch",
        original="        rng = np.random.default_rng([args.seed, epoch])",
        planted="        rng = np.random.default_rng(args.seed)",
        flags="--recipe tiny",
        symptom="I logged the crops: the same image has the same crop in every epoch, and the"
        " minibatches come in the same order each time. What is random about this"
        " augmentation?",
        hints=[
            "Which random numbers should differ from epoch to epoch?",
            "On what does the seed of an epoch's generator depend?",
        ],
        lesson="A generator that is seeded anew in every epoch needs the epoch in its seed, or each"
        " image comes with the same crop, in the same minibatch, again and again.",
        test="test_15_imagenet.py::test_batches_are_a_function_of_seed_and_iteration",
    ),
    Bug(
        step="15_imagenet",
        name="a mean that is divided a second time",
        original='        loss = F.cross_entropy(logits, y, reduction="sum")',
        planted="        loss = F.cross_entropy(logits, y)",
        flags="--recipe tiny --epochs 1",
        symptom="After an epoch val_loss is far below 0.1, and lower still with a larger"
        " --batch_size, while top1 is what it should be.",
        hints=[
            "What would the loss of a model be that knows nothing?",
            "What is added up over the batches, and by what is the sum divided?",
        ],
        lesson="cross_entropy returns the mean over the batch: to average over all images, add up"
        " sums, and divide once by the number of images.",
        test="test_15_imagenet.py::test_every_validation_image_counts_once",
    ),
    Bug(
        step="15_imagenet",
        name="a moving average with its weights exchanged",
        original="    torch._foreach_lerp_(averages, values, 1 - decay)",
        planted="    torch._foreach_lerp_(averages, values, decay)",
        flags="--recipe tiny",
        symptom="The validation accuracy fluctuates from epoch to epoch, as it does without"
        " averaged weights. Between --ema_decay 0 and --ema_decay 0.99 I see hardly any"
        " difference.",
        hints=[
            "Does --ema_decay 0 (evaluate the last weights) change the results?",
            "lerp(a, b, w) = a + w * (b - a): which one gets the weight 0.99?",
        ],
        lesson="With its two weights exchanged, the average is almost the latest value and averages"
        " nothing; the formula in the docstring is worth a test of its own.",
        test="test_15_imagenet.py::test_what_is_evaluated_is_the_average_of_the_weights",
    ),
    Bug(
        step="15_imagenet",
        name="optimizer state that is lost at a resume",
        original='    parts = {"model": model, "ema": ema, "optimizer": optimizer}',
        planted='    parts = {"model": model, "ema": ema}',
        flags="--recipe tiny",
        symptom="A run that I stopped with Ctrl-C and resumed is not the run that was never"
        " stopped. The first loss after the resume is right, and so are the weights in"
        " last.pt, but from the second iteration on all is different.",
        hints=[
            "List all that the next update depends on. Is all of it in last.pt?",
            "print(torch.load('last.pt').keys())",
        ],
        lesson="A checkpoint must hold all that the next update depends on: without the optimizer's"
        " state, the momentum starts from zero, and a resumed run is another run.",
        test="test_15_imagenet.py::test_signal_saves_and_ends[15]",
    ),
    # ---------- 16_nanogpt_shakespeare ----------
    Bug(
        step="16_nanogpt_shakespeare",
        name="a cached token at the wrong position",
        original="self.wpe.weight[n : n + x.shape[1]])",
        planted="self.wpe.weight[: x.shape[1]])",
        flags="--max_iters 200 --eval_interval 100",
        symptom="The training, and val_loss, are as they should be, but the samples are poor."
        " generate without its cache writes much better text.",
        hints=[
            "Compare generate with and without use_cache, at temperature 0.",
            "With a cache, x holds one new token. Where in the text does it stand?",
        ],
        lesson="A cache keeps keys and values, but the new token's position has to be counted from"
        " the cached ones on: else each token believes that it is the first.",
        test="test_16_nanogpt_shakespeare.py::test_cached_sampling_writes_the_same_text[5]",
    ),
    Bug(
        step="16_nanogpt_shakespeare",
        name="clipping after the update",
        original="""        if args.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = schedule(args, iter_num)
            optimizer.step()
            optimizer.zero_grad()
""",
        planted="""        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = schedule(args, iter_num)
            optimizer.step()
            optimizer.zero_grad()
        if args.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
""",
        flags="--max_iters 200 --eval_interval 100 --optimizer adamw --grad_clip 0.001",
        symptom="--grad_clip has no effect: 0.001 gives the same losses as 0, which switches"
        " clipping off. The gradient norm that I print after clipping is 0.",
        hints=[
            "Print the gradient norm that clip_grad_norm_ returns.",
            "In which order do backward, clip and step have to come?",
        ],
        lesson="Gradients are clipped between backward and step; after the update there is nothing"
        " left to clip, and no error says so.",
        test="test_16_nanogpt_shakespeare.py::test_training_is_the_recipe[adamw]",
    ),
    Bug(
        step="16_nanogpt_shakespeare",
        name="validation on training data",
        original="    return ids[:split], ids[split:], vocab",
        planted="    return ids[:split], ids[: len(ids) - split], vocab",
        flags="--max_iters 200 --eval_interval 100",
        symptom="After 200 iterations val_loss is 2.015 instead of 2.080, while train_loss is"
        " the same as ever. Have I found a better model without changing it?",
        hints=[
            "Decode the first characters of both parts of the data.",
            "Which characters does the training text have in common with the validation text?",
        ],
        lesson="The validation text must not overlap the training text: the usual sign is that the"
        " gap between the two losses never opens, however long the training is.",
        test="test_16_nanogpt_shakespeare.py::"
        "test_the_first_nine_tenths_train_and_the_rest_validates",
    ),
    Bug(
        step="16_nanogpt_shakespeare",
        name="targets that are the inputs",
        original="        yield chunks[:, :-1], chunks[:, 1:]",
        planted="        yield chunks[:, :-1], chunks[:, :-1]",
        flags="--max_iters 200 --eval_interval 100",
        symptom="The training loss is 0.00015 after 200 iterations, where 2.12 is usual. But"
        " val_loss rises from 4.22 to 19.9 (a model that knows nothing has log(65) ="
        " 4.17), and the samples repeat one character.",
        hints=[
            "train_loss and val_loss disagree: do both ask the model the same question?",
            "Let ids be 0, 1, 2, ... and print one x and its y.",
        ],
        lesson="With targets that are not shifted the model learns to repeat its input: an"
        " excellent training loss, and a validation loss worse than chance.",
        test="test_16_nanogpt_shakespeare.py::"
        "test_a_batch_is_windows_and_the_characters_after_them",
    ),
    Bug(
        step="16_nanogpt_shakespeare",
        name="weight decay on layer norms and biases",
        original='{"params": vectors, "weight_decay": 0.0}]',
        planted='{"params": vectors}]',
        flags="--max_iters 200 --eval_interval 100 --weight_decay 10 --optimizer adamw",
        symptom="With a large --weight_decay the scales of the layer norms shrink from"
        " iteration to iteration. In nanoGPT they are exempt, and the docstring here"
        " says the same.",
        hints=[
            "Print the scales of the layer norms after training.",
            "Where does a parameter group get the hyperparameters that it does not name?",
        ],
        lesson="A parameter group inherits what it does not name: the norms and biases, which"
        " should not decay, decay like the matrices.",
        test="test_16_nanogpt_shakespeare.py::test_matrices_decay_and_vectors_do_not[adamw]",
    ),
    # ---------- 17_gpt2_multigpu ----------
    Bug(
        step="17_gpt2_multigpu",
        name="accumulated gradients that are not scaled",
        original="            micro_loss = batch_loss(*batch) / args.n_micro_batches",
        planted="            micro_loss = batch_loss(*batch)",
        flags="",
        symptom="The loss in the progress bar is far above that of the evaluation, by a factor"
        " that depends on --batch_size. Halving --batch_size, which should only save"
        " memory, changes the whole run.",
        hints=[
            "Halve --batch_size: the batch of an update stays the same, and so should its loss.",
            "backward adds the gradients of the micro-batches. What is their mean?",
        ],
        lesson="Gradients accumulate as a sum: each micro-batch's loss has to be divided by their"
        " number, or gradients, clipping and the loss depend on how the batch is cut.",
        test="test_17_gpt2_multigpu.py::test_accumulation_changes_nothing",
    ),
    Bug(
        step="17_gpt2_multigpu",
        name="ranks that read the same data",
        original=" // args.block_size + args.rank * args.batch_size",
        planted=" // args.block_size",
        flags="",
        symptom="On two GPUs (torchrun --standalone --nproc_per_node=2) it trains on twice as"
        " many tokens per second, but the loss per update is no better than that of one"
        " process with half of the batch.",
        hints=[
            "Print the first token of every micro-batch in both processes.",
            "On what does the place of a process in the data depend?",
        ],
        lesson="Data parallelism needs different data on every rank: with the same data, N GPUs"
        " compute the same gradient N times, and only the speed seems to scale.",
        test="test_17_gpt2_multigpu.py::test_the_data_do_not_depend_on_the_number_of_processes",
    ),
    Bug(
        step="17_gpt2_multigpu",
        name="the same dropout masks on every rank",
        original="iter_num * args.world_size + args.rank)",
        planted="iter_num)",
        flags="--dropout 0.2",
        symptom="With dropout, two processes do not give what one process with twice the"
        " accumulation gives, on average: their gradients are noisier. Without dropout"
        " both are the same.",
        hints=[
            "Print torch.rand(1) in each process, just before the first micro-batch.",
            "By what do the seeds of two processes have to differ?",
        ],
        lesson="Ranks that are seeded alike draw the same dropout masks: the noise does not average"
        " out over the processes. The seed needs the rank, and in a resumable run the iteration.",
        test="test_17_gpt2_multigpu.py::"
        "test_every_process_and_iteration_has_dropout_masks_of_its_own",
    ),
    Bug(
        step="17_gpt2_multigpu",
        name="a resumed run that reads from the beginning",
        original="    p = iter_num * args.total_batch_tokens // args.block_size + args.rank",
        planted="    p = args.rank",
        flags="",
        symptom="A run that was killed and resumed is not the run that was never killed:"
        " weights and optimizer state are right at the resume, but from then on the"
        " losses differ. It seems to see again what it saw at the beginning.",
        hints=[
            "What does a run read in its first iteration, and what after a resume?",
            "Which arguments of minibatches are used, and which one is not?",
        ],
        lesson="A resumed run has to go on in the data where it stopped: one that starts over sees"
        " the first part of the data again after every restart, and the rest never.",
        test="test_17_gpt2_multigpu.py::test_the_place_in_the_data_is_the_iteration",
    ),
    Bug(
        step="17_gpt2_multigpu",
        name="gradients that are clipped before they are unscaled",
        original="        for optimizer in optimizers.values():\n"
        "            scaler.unscale_(optimizer)\n",
        planted="",
        flags="--dtype float16",
        symptom="In float16 the updates are not those of bfloat16 or float32; with --grad_clip"
        " 0 they are about the same. The gradient norm, where I print it, is enormous.",
        hints=[
            "Print grad_norm. With --dtype float32 it is of the order of 1.",
            "The GradScaler multiplies the loss. In what unit are the gradients when they are"
            " clipped?",
        ],
        lesson="With a GradScaler the gradients are multiplied by its scale until unscale_ is"
        " called: clipping before that shrinks every gradient to next to nothing.",
        test="test_17_gpt2_multigpu.py::test_training_is_the_recipe[float16]",
    ),
]
