"""What Besiroglu et al. 2024 print (arXiv 2404.10102, and its notebook); nothing is computed."""

# Best fit, standard errors from 4000 bootstraps, and 95 % intervals.
PARAMETERS = {"A": 482.006, "B": 2085.434, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585}
STANDARD_ERRORS = {"A": 124.522, "B": 1293.284, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
INTERVALS_95 = {
    "A": (285.2, 743.6),
    "B": (1042.0, 5810.0),
    "E": (1.769, 1.871),
    "alpha": (0.317, 0.373),
    "beta": (0.331, 0.415),
}
# a = beta / (alpha + beta), the exponent of the optimal N in compute.
ALLOCATION = {"a": 0.513, "standard_error": 0.020, "width_80": 0.051}
LOG_LIKELIHOOD = {"best": 879.77, "hoffmann": 837.78, "hoffmann_rounded": 562.25}
LIKELIHOOD_RATIO = 84.00

# Hoffmann et al. 2022, approach 3: to the digits of their source, and as they print it.
HOFFMANN = {
    "log_A": 6.0073404,
    "log_B": 6.0179186,
    "log_E": 0.5267228,
    "alpha": 0.33917084,
    "beta": 0.2849083,
}
HOFFMANN_ROUNDED = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
