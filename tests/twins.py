"Slow, independent twins that more than one test holds the code against."
import numpy as np
from scipy.ndimage import correlate1d


def numpy_ssim(x, y):
    "One image [C, H, W] against another, window by window, with zeros beyond the border."
    g = np.exp(-np.arange(-5, 6)**2/4.5)
    blur = lambda a: correlate1d(correlate1d(a, g/g.sum(), axis=1, mode='constant'), g/g.sum(), axis=2, mode='constant')
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x*x) - mx**2, blur(y*y) - my**2, blur(x*y) - mx*my
    return np.mean((2*mx*my + 1e-4)*(2*cov + 9e-4)/((mx**2 + my**2 + 1e-4)*(vx + vy + 9e-4)))
