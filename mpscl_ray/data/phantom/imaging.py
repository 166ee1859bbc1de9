"""Appearance of the phantom's tissues: contrast-enhanced CT angiography and balanced SSFP whole-heart MR.

Both scans have ranges of physical parameters, from which the values of each patient are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtr

Floats = NDArray[np.float32]
Range = tuple[float, float]


class Tissue(Enum):
    """Tissues that differ in MR or in CT. Blood differs by the time at which the contrast agent arrives."""

    AIR = "air"
    LUNG = "lung"
    FAT = "fat"
    MUSCLE = "muscle"
    BONE = "bone"
    LIVER = "liver"
    STOMACH = "stomach"
    MYOCARDIUM = "myocardium"
    VENA_CAVA = "vena cava"
    RIGHT_ATRIUM = "right atrium"
    RIGHT_VENTRICLE = "right ventricle"
    PULMONARY = "pulmonary artery"
    LEFT_ATRIUM = "left atrium"
    LEFT_VENTRICLE = "left ventricle"
    AORTA = "ascending aorta"
    DESCENDING = "descending aorta"


ARTERIAL = (Tissue.LEFT_ATRIUM, Tissue.LEFT_VENTRICLE, Tissue.AORTA, Tissue.DESCENDING)
VENOUS = (Tissue.VENA_CAVA, Tissue.RIGHT_ATRIUM, Tissue.RIGHT_VENTRICLE, Tissue.PULMONARY)

HOUNSFIELD: dict[Tissue, float] = {
    Tissue.AIR: -1000,
    Tissue.LUNG: -830,
    Tissue.FAT: -95,
    Tissue.MUSCLE: 55,
    Tissue.BONE: 260,
    Tissue.LIVER: 70,
    Tissue.STOMACH: 35,
    Tissue.MYOCARDIUM: 45,
}
"""CT numbers without contrast agent at 100-120 kV; blood 42. Bone is the mean of cortex and marrow."""

BLOOD_HU = 42.0

ARRIVAL_S: dict[Tissue, float] = {
    Tissue.VENA_CAVA: 5.0,
    Tissue.RIGHT_ATRIUM: 7.0,
    Tissue.RIGHT_VENTRICLE: 8.0,
    Tissue.PULMONARY: 10.0,
    Tissue.LEFT_ATRIUM: 15.0,
    Tissue.LEFT_VENTRICLE: 16.0,
    Tissue.AORTA: 18.0,
    Tissue.DESCENDING: 19.5,
}
"""Seconds from the start of an antecubital injection to the front of the bolus at normal cardiac output."""

RELAXATION: dict[Tissue, tuple[float, float, float]] = {
    Tissue.AIR: (0.0, 1000.0, 50.0),
    Tissue.LUNG: (0.12, 1200.0, 40.0),
    Tissue.FAT: (0.90, 280.0, 80.0),
    Tissue.MUSCLE: (0.78, 950.0, 45.0),
    Tissue.BONE: (0.45, 550.0, 50.0),
    Tissue.LIVER: (0.75, 600.0, 48.0),
    Tissue.STOMACH: (0.85, 1400.0, 90.0),
    Tissue.MYOCARDIUM: (0.80, 1000.0, 52.0),
    **dict.fromkeys(ARTERIAL, (0.93, 1480.0, 240.0)),
    **dict.fromkeys(VENOUS, (0.93, 1520.0, 170.0)),
}
"""Proton density, T1 and T2 in ms at 1.5 T. Venous blood has the shorter T2 because of deoxygenated haemoglobin."""

FWHM_TO_SIGMA = 1 / 2.3548


def _draw(rng: np.random.Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


@dataclass(frozen=True)
class CtScan:
    """ECG-gated CT angiogram of the heart, timed on the ascending aorta.

    Saline follows the contrast bolus, so the right heart is anywhere between enhanced and washed out.
    """

    spacing_mm: Range = (1.7, 2.1)
    """In-plane voxel size."""
    slice_mm: Range = (1.8, 2.4)
    """Voxel size along z."""
    field_mm: tuple[float, float, float] = (182.0, 172.0, 166.0)
    """Field of view along RAS axes."""
    enhancement_hu: Range = (310.0, 460.0)
    """Enhancement of the left heart by the bolus."""
    injection_s: Range = (11.0, 18.0)
    """Length of the bolus."""
    delay_s: Range = (5.0, 9.0)
    """Time from the arrival of the bolus in the ascending aorta to the scan."""
    perfusion_hu: Range = (40.0, 70.0)
    """Enhancement of the myocardium."""
    noise_hu: Range = (18.0, 32.0)
    """Standard deviation of the noise after reconstruction."""
    kernel_mm: Range = (2.2, 3.0)
    """FWHM of the reconstruction kernel, which also blurs the anatomy."""

    def draw_grid(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], tuple[int, ...]]:
        """Voxel size in mm and number of voxels along RAS axes."""
        plane = _draw(rng, self.spacing_mm)
        spacing = np.array([plane, plane, _draw(rng, self.slice_mm)])
        return spacing, tuple(int(n) for n in np.round(np.asarray(self.field_mm) / spacing))

    def draw_values(self, rng: np.random.Generator) -> dict[Tissue, float]:
        """Hounsfield units of every tissue of one patient.

        The enhancement of a chamber is the bolus, a box of the injection's length T from the chamber's arrival time t0
        on, dispersed by a Gaussian of width s that grows on the way, plus recirculated contrast agent:
        E / peak = 0.88 {Phi((t - t0) / s) - Phi((t - t0 - T) / s)} + 0.12.
        """
        values = {tissue: hu + float(rng.normal(0, 6)) for tissue, hu in HOUNSFIELD.items()}
        values[Tissue.AIR] = HOUNSFIELD[Tissue.AIR]
        values[Tissue.LUNG] += float(rng.normal(0, 25))
        values[Tissue.MYOCARDIUM] += _draw(rng, self.perfusion_hu)
        peak, injection = _draw(rng, self.enhancement_hu), _draw(rng, self.injection_s)
        time = ARRIVAL_S[Tissue.AORTA] + _draw(rng, self.delay_s)
        for tissue, arrival in ARRIVAL_S.items():
            width = 1.5 + 0.1 * arrival
            bolus = ndtr((time - arrival) / width) - ndtr((time - arrival - injection) / width)
            values[tissue] = BLOOD_HU + peak * float(0.88 * bolus + 0.12) + float(rng.normal(0, 8))
        return values

    def acquire(
        self,
        rng: np.random.Generator,
        signal: Floats,
        spacing: NDArray[np.float64],
        grid: tuple[Floats, Floats, Floats],
        smooth: Floats,
    ) -> NDArray[np.int16]:
        """Reconstruction kernel, correlated noise, whole Hounsfield units. ``smooth`` is unused: CT has no coil."""
        sigma = _draw(rng, self.kernel_mm) * FWHM_TO_SIGMA / spacing
        image = ndimage.gaussian_filter(signal, sigma, mode="nearest", truncate=3)
        noise = ndimage.gaussian_filter(rng.standard_normal(signal.shape, dtype=np.float32), sigma, truncate=3)
        image += noise * np.float32(_draw(rng, self.noise_hu) / noise.std())
        return np.clip(np.round(image), -1024, 3071).astype(np.int16)


@dataclass(frozen=True)
class MrScan:
    """Free-breathing 3-D balanced SSFP of the whole heart with T2 preparation and fat suppression at 1.5 T."""

    spacing_mm: Range = (1.7, 2.2)
    slice_mm: Range = (2.2, 3.2)
    field_mm: tuple[float, float, float] = (192.0, 178.0, 176.0)
    flip_deg: Range = (50.0, 75.0)
    echo_ms: float = 1.8
    preparation_ms: Range = (0.0, 15.0)
    fat_residual: Range = (0.08, 0.2)
    """Share of the fat signal that the suppression leaves."""
    flow_loss: Range = (0.0, 0.2)
    coil_fall: Range = (0.15, 0.4)
    """Loss of sensitivity per 100 mm away from the anterior array."""
    bias: Range = (0.06, 0.16)
    """Standard deviation of the smooth logarithmic coil field."""
    snr: Range = (14.0, 26.0)
    """Signal of arterial blood over the noise of one channel, Rician in the magnitude."""
    gain: Range = (400.0, 1400.0)

    def draw_grid(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], tuple[int, ...]]:
        """Voxel size in mm and number of voxels along RAS axes; the thick slices are along any of the three."""
        spacing = np.full(3, _draw(rng, self.spacing_mm))
        spacing[int(rng.integers(3))] = _draw(rng, self.slice_mm)
        return spacing, tuple(int(n) for n in np.round(np.asarray(self.field_mm) / spacing))

    def draw_values(self, rng: np.random.Generator) -> dict[Tissue, float]:
        """Steady-state signal of every tissue of one patient, arterial blood = 1.

        S = PD sin a / (1 + cos a + (1 - cos a) T1/T2) exp(-(TE + TP)/T2), the limit TR << T2 of balanced SSFP, with the
        T2 preparation TP; fat times what its suppression leaves; flowing blood loses a share to dephasing.
        """
        flip, prep = np.deg2rad(_draw(rng, self.flip_deg)), _draw(rng, self.preparation_ms)
        values = {}
        for tissue, (density, t1, t2) in RELAXATION.items():
            t1, t2 = t1 * float(np.exp(rng.normal(0, 0.04))), t2 * float(np.exp(rng.normal(0, 0.05)))
            steady = density * np.sin(flip) / (1 + np.cos(flip) + (1 - np.cos(flip)) * t1 / t2)
            values[tissue] = float(steady * np.exp(-(self.echo_ms + prep) / t2))
        reference = float(np.mean([values[tissue] for tissue in ARTERIAL]))
        values[Tissue.FAT] *= _draw(rng, self.fat_residual)
        values[Tissue.BONE] *= 0.5 + 0.5 * _draw(rng, self.fat_residual)  # half of the marrow is fat
        for tissue in ARTERIAL + VENOUS:
            values[tissue] *= 1 - _draw(rng, self.flow_loss)
        return {tissue: value / reference for tissue, value in values.items()}

    def acquire(
        self,
        rng: np.random.Generator,
        signal: Floats,
        spacing: NDArray[np.float64],
        grid: tuple[Floats, Floats, Floats],
        smooth: Floats,
    ) -> NDArray[np.int16]:
        """Finite k-space (blur of one voxel), coil sensitivity, Rician noise, arbitrary gain, whole numbers."""
        image = ndimage.gaussian_filter(signal, FWHM_TO_SIGMA, mode="nearest", truncate=3)
        depth = (grid[1].max() - grid[1]) / np.float32(100)
        sensitivity = np.exp(
            -np.float32(_draw(rng, self.coil_fall)) * depth + np.float32(_draw(rng, self.bias)) * smooth
        )
        image *= sensitivity / sensitivity.mean()
        level = np.float32(1 / _draw(rng, self.snr))
        real = image + level * rng.standard_normal(signal.shape, dtype=np.float32)
        imaginary = level * rng.standard_normal(signal.shape, dtype=np.float32)
        magnitude = np.hypot(real, imaginary) * np.float32(_draw(rng, self.gain))
        stored: NDArray[np.int16] = np.clip(np.round(magnitude), 0, 32767).astype(np.int16)
        return stored
