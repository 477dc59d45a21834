"""Every tolerance of the model tests, named, with its reason.

Monte Carlo comparisons use no number from here but their own standard error and ``N_SIGMA``.
"""

#: Closed form against closed form in float64: a few hundred roundings.
CLOSED_FORM = 1e-10
#: Against SciPy in float64: its special functions agree with torch's to about this.
SCIPY = 1e-6
#: ``torch.autograd.gradcheck``: central differences with step 1e-6 in float64.
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4}
#: Standard errors by which a Monte Carlo mean may miss. All tests are seeded; 5 leaves the chance
#: that a change of seed breaks one of some hundred comparisons below 1e-4.
N_SIGMA = 5.0
#: Goodness of fit: the chance of a false alarm of the whole suite, shared by its GOF_TESTS tests.
GOF_FALSE_ALARM = 2e-4
GOF_TESTS = 20
#: Sums of the same float32 terms in another order, relative to the sum of their sizes.
FLOAT32_SUM = 1e-5
#: The same in float64.
FLOAT64_SUM = 1e-10
