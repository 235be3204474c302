"""The findings reader of metrics/findings.py on hand-written texts.

Every case is a text and what a careful reader takes from it. In `MATTERS` the named findings must
have the named value (None: not mentioned); in `EXACT` the whole dictionary must be equal. Both were
written before the rules were tuned; `LATER` holds, in the form of `EXACT`, texts that were tried
afterwards, with the ones that had been read wrongly.
"""

import os
import random
import re

import pytest

from metrics.findings import FINDINGS, finding_scores, is_refusal, read_findings

ATE, CAR, CON, EDE = "Atelectasis", "Cardiomegaly", "Consolidation", "Edema"
ECM, FRA, LES, OPA = "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion", "Lung Opacity"
NOF, EFF = "No Finding", "Pleural Effusion"
PLO, PNA, PNX, DEV = "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"

MATTERS = {
    "atelectasis": [
        ("Bibasilar atelectasis.", {ATE: 1}),
        ("Low lung volumes with bibasilar subsegmental atelectasis.", {ATE: 1}),
        ("There is plate-like atelectasis in the left base.", {ATE: 1, DEV: None}),
        ("Linear atelectases in the left mid lung are again seen.", {ATE: 1}),
        ("Right lower lobe collapse.", {ATE: 1}),
        ("Atelectatic changes at the lung bases.", {ATE: 1}),
        ("Bibasilar opacities may represent atelectasis.", {ATE: -1, OPA: 1}),
        ("Bibasilar atelectasis or infiltrate.", {ATE: -1, OPA: -1}),
        ("Left basilar opacity, atelectasis versus pneumonia.", {ATE: -1, PNA: -1, OPA: 1}),
        ("Streaky opacities, likely atelectasis.", {ATE: 1, OPA: 1}),
        ("Retrocardiac density most consistent with atelectasis.", {ATE: 1}),
        ("XXXX opacities in the lung bases compatible with scarring or atelectasis.", {ATE: -1}),
        ("No atelectasis.", {ATE: 0}),
        ("Collapse of the T8 vertebral body.", {ATE: None}),
        ("Mild vertebral body collapse is unchanged.", {ATE: None}),
        ("Opacity represents atelectasis rather than pneumonia.", {ATE: 1, PNA: 0}),
        ("Previously seen left basilar atelectasis has resolved.", {ATE: 0}),
        ("Interval clearing of the right basilar atelectasis.", {ATE: 0}),
        ("Probable right middle lobe atelectasis.", {ATE: -1}),
    ],
    "cardiomegaly": [
        ("Stable cardiomegaly.", {CAR: 1}),
        ("Mild cardiomegaly without overt edema.", {CAR: 1, EDE: 0}),
        ("The heart is enlarged.", {CAR: 1}),
        ("Heart size is mildly enlarged.", {CAR: 1}),
        ("The cardiac silhouette is prominent.", {CAR: 1}),
        ("There is enlargement of the cardiac silhouette.", {CAR: 1}),
        ("Heart is large.", {CAR: 1}),
        ("Moderately enlarged heart with tortuous aorta.", {CAR: 1}),
        ("The heart is enlarged but stable.", {CAR: 1}),
        ("Stable enlarged cardiac silhouette.", {CAR: 1}),
        ("Borderline cardiomegaly.", {CAR: 1}),
        ("Heart size is borderline enlarged.", {CAR: 1}),
        ("Heart size is borderline.", {CAR: -1}),
        ("Borderline heart size.", {CAR: -1}),
        ("Heart size is at the upper limits of normal.", {CAR: 0}),
        ("The heart is top normal in size.", {CAR: 0}),
        ("Heart size is normal.", {CAR: 0}),
        ("Heart size normal and lungs are clear.", {CAR: 0}),
        ("The heart is normal in size and contour.", {CAR: 0}),
        ("Normal heart size.", {CAR: 0}),
        ("The heart is not enlarged.", {CAR: 0}),
        ("The heart is not significantly enlarged.", {CAR: 0}),
        ("No cardiomegaly.", {CAR: 0}),
        ("No evidence of cardiac enlargement.", {CAR: 0}),
        ("Heart size and pulmonary vascularity appear within normal limits.", {CAR: 0}),
        ("Heart size within normal limits, stable mediastinal and hilar contours.",
         {CAR: 0, ECM: -1}),
        ("Heart size is unchanged.", {CAR: -1}),
        ("Stable heart size.", {CAR: -1}),
        ("No significant change in heart size.", {CAR: -1}),
        ("Heart size is difficult to evaluate.", {CAR: -1}),
        ("The heart is obscured by the large right effusion.", {CAR: -1, EFF: 1}),
        ("Cardiac size cannot be evaluated.", {CAR: -1}),
        ("The heart may be mildly enlarged.", {CAR: -1}),
        ("The heart silhouette appears enlarged, which may reflect underlying cardiomegaly.",
         {CAR: 1}),
        ("The heart and lungs have XXXX XXXX in the interval.", {CAR: None}),
        ("Leads overlying the heart are unchanged.", {CAR: None}),
        ("The heart is visible in this image.", {CAR: None}),
        ("Heart size is normal and the aorta is enlarged.", {CAR: 0}),
        ("Heart: Mildly enlarged.", {CAR: 1}),
        ("Heart size: normal", {CAR: 0}),
    ],
    "enlarged cardiomediastinum": [
        ("Cardiomediastinal silhouette is within normal limits.", {ECM: 0, CAR: None}),
        ("The cardiac silhouette and mediastinum size are within normal limits.", {CAR: 0, ECM: 0}),
        ("Cardiac and mediastinal contours are within normal limits.", {CAR: 0, ECM: 0}),
        ("Normal heart size and mediastinal contours.", {CAR: 0, ECM: 0}),
        ("Widened mediastinum.", {ECM: 1}),
        ("Mediastinal widening is present.", {ECM: 1}),
        ("No mediastinal widening.", {ECM: 0}),
        ("The mediastinum is not widened.", {ECM: 0}),
        ("The heart is mildly enlarged with normal mediastinal contours.", {CAR: 1, ECM: 0}),
        ("The heart is enlarged and mediastinal contours are normal.", {CAR: 1, ECM: 0}),
        ("Normal heart size and enlarged mediastinal contours.", {CAR: 0, ECM: 1}),
        ("The cardiomediastinal silhouette is stable.", {ECM: -1}),
        ("Enlarged cardiomediastinal silhouette.", {ECM: 1}),
        ("Mediastinal shift to the right.", {ECM: None}),
        ("No mediastinal mass.", {ECM: None, LES: 0}),
        ("Heart size, mediastinal contours, and hilar structures are unremarkable.",
         {CAR: 0, ECM: 0}),
        ("Cardiomediastinal silhouette: Within normal limits.", {ECM: 0}),
    ],
    "consolidation": [
        ("Right lower lobe consolidation.", {CON: 1}),
        ("Consolidative opacity in the lingula.", {CON: 1, OPA: 1}),
        ("No focal consolidation.", {CON: 0}),
        ("No focal consolidation, pleural effusion or pneumothorax.", {CON: 0, EFF: 0, PNX: 0}),
        ("No focal consolidation, large pleural effusion, or pneumothorax is identified.",
         {CON: 0, EFF: 0, PNX: 0}),
        ("Minimal patchy airspace disease within the lingula, may reflect atelectasis or "
         "consolidation.",
         {OPA: 1, ATE: -1, CON: -1}),
        ("The lungs are clear of focal consolidation.", {CON: 0}),
        ("There is no definite consolidation.", {CON: 0}),
        ("No obvious consolidation.", {CON: 0}),
        ("No new consolidation.", {CON: -1}),
        ("There is no new focal consolidation or effusion.", {CON: -1, EFF: -1}),
    ],
    "edema": [
        ("Mild interstitial edema.", {EDE: 1}),
        ("Pulmonary oedema is present.", {EDE: 1}),
        ("Findings of congestive heart failure.", {EDE: 1, CAR: -1}),
        ("CHF.", {EDE: 1, CAR: -1}),
        ("No evidence of CHF.", {EDE: 0, CAR: None}),
        ("Pulmonary vascular congestion.", {EDE: -1}),
        ("Mild pulmonary vascular congestion without overt edema.", {EDE: -1}),
        ("No pulmonary venous congestion.", {EDE: 0}),
        ("Cardiomegaly with findings of heart failure.", {EDE: 1, CAR: 1}),
        ("Interval improvement in pulmonary edema.", {EDE: 1}),
        ("Pulmonary edema has resolved.", {EDE: 0}),
        ("Possible mild edema.", {EDE: -1}),
        ("Bilateral opacities suggestive of edema.", {EDE: 1}),
        ("Soft tissue edema of the chest wall.", {EDE: None}),
    ],
    "pleural effusion": [
        ("Large right pleural effusion.", {EFF: 1}),
        ("Bilateral pleural effusions, right greater than left.", {EFF: 1}),
        ("No pneumothorax. Large pleural effusion.", {PNX: 0, EFF: 1}),
        ("No large effusion.", {EFF: 0}),
        ("There are no XXXX of a pleural effusion.", {EFF: 0}),
        ("There is no pleural effusion or pneumothorax.", {EFF: 0, PNX: 0}),
        ("Moderate pericardial effusion.", {EFF: None}),
        ("Blunting of the left costophrenic angle, which may represent a small effusion.",
         {EFF: -1}),
        ("Small left effusion cannot be excluded.", {EFF: -1}),
        ("A small effusion is difficult to exclude.", {EFF: -1}),
        ("Left pleural effusion with adjacent atelectasis. Right effusion is also present.",
         {EFF: 1, ATE: 1}),
        ("The left effusion is no longer seen.", {EFF: 0}),
        ("Resolution of the left pleural effusion.", {EFF: 0}),
        ("Resolved left pleural effusion.", {EFF: 0}),
        ("Near complete resolution of the left pleural effusion.", {EFF: 1}),
        ("No significant change in the moderate left pleural effusion.", {EFF: 1}),
        ("The effusion has not changed.", {EFF: 1}),
        ("No interval change in bilateral effusions.", {EFF: 1}),
        ("The pleural spaces are clear without effusion.", {EFF: 0}),
        ("There is fluid in the pleural space.", {EFF: 1}),
        ("Effusions are not seen.", {EFF: 0}),
        ("The lungs are clear bilaterally with no pleural effusions.", {EFF: 0}),
        ("Small effusion is present and pneumothorax is absent.", {EFF: 1, PNX: 0}),
        ("Effusion has increased and pneumothorax has resolved.", {EFF: 1, PNX: 0}),
    ],
    "pleural other": [
        ("Biapical pleural thickening.", {PLO: 1}),
        ("Pleural scarring at the left apex.", {PLO: 1, OPA: None}),
        ("No pleural thickening.", {PLO: 0}),
        ("Pulmonary fibrosis.", {PLO: 1}),
        ("Calcified pleural plaques.", {PLO: 1}),
        ("Pleural effusion or thickening.", {EFF: -1}),
    ],
    "pneumonia": [
        ("Right middle lobe pneumonia.", {PNA: 1}),
        ("Findings are concerning for pneumonia.", {PNA: -1}),
        ("Opacity suspicious for infection.", {PNA: -1, OPA: 1}),
        ("No focal air space opacity to suggest a pneumonia.", {PNA: 0, OPA: 0}),
        ("No airspace opacity is seen to suggest pneumonia.", {PNA: 0, OPA: 0}),
        ("Cannot exclude pneumonia.", {PNA: -1}),
        ("Pneumonia is not excluded.", {PNA: -1}),
        ("Superimposed infection can't be ruled out.", {PNA: -1}),
        ("Pneumonia is unlikely.", {PNA: 0}),
        ("Atelectasis, less likely pneumonia.", {ATE: 1, PNA: -1}),
        ("Pneumonia should be considered.", {PNA: -1}),
        ("No findings suspicious for pneumonia.", {PNA: 0}),
        ("History of pneumonia.", {PNA: None}),
        ("Negative for pneumonia.", {PNA: 0}),
        ("Lungs are clear without evidence of pneumonia.", {PNA: 0}),
        ("No acute infectious process.", {PNA: 0}),
        ("? pneumonia.", {PNA: -1}),
        ("Pneumonia has been ruled out.", {PNA: 0}),
        ("Pneumonia is suspected.", {PNA: -1}),
        ("Right basilar airspace disease consistent with pneumonia.", {PNA: 1, OPA: 1}),
        ("Bronchopneumonia in the left base.", {PNA: 1}),
    ],
    "pneumothorax": [
        ("Small right apical pneumothorax.", {PNX: 1}),
        ("No pneumothorax.", {PNX: 0}),
        ("Bilateral pneumothoraces.", {PNX: 1}),
        ("No visualized pneumothorax.", {PNX: 0}),
        ("Right hydropneumothorax.", {PNX: 1, EFF: 1}),
        ("Pneumothorax is not identified.", {PNX: 0}),
        ("No residual pneumothorax.", {PNX: 0}),
        ("There is neither pneumothorax nor effusion.", {PNX: 0, EFF: 0}),
        ("Negative for focal consolidation, pneumothorax, or pleural effusion.",
         {CON: 0, PNX: 0, EFF: 0}),
        ("No displaced rib fractures, pneumomediastinum, or pneumothorax.", {FRA: 0, PNX: 0}),
        ("No pneumothorax, but large left pleural effusion.", {PNX: 0, EFF: 1}),
        ("No pneumothorax, there is a small effusion.", {PNX: 0, EFF: 1}),
        ("No pneumothorax with a stable left effusion.", {PNX: 0, EFF: 1}),
        ("No pneumothorax is seen and the effusion is unchanged.", {PNX: 0, EFF: 1}),
        ("Chest tube removed without pneumothorax.", {PNX: 0}),
    ],
    "fracture": [
        ("Healing left rib fractures.", {FRA: 1}),
        ("No acute fracture.", {FRA: 0}),
        ("Old fracture of the right clavicle.", {FRA: 1}),
        ("There is no evidence of displaced rib fracture.", {FRA: 0}),
        ("Compression fracture of indeterminate age.", {FRA: 1}),
    ],
    "lung lesion": [
        ("1.5 cm nodule in the right upper lobe.", {LES: 1}),
        ("No suspicious pulmonary nodules or masses.", {LES: 0}),
        ("Calcified granuloma in the left base.", {LES: None, NOF: None}),
        ("Calcified nodule in the right lung.", {LES: None}),
        ("Massive cardiomegaly.", {LES: None, CAR: 1}),
        ("Effusion without mass effect.", {LES: None, EFF: 1}),
        ("Nodular opacity in the right apex.", {LES: 1}),
        ("Possible mass in the right hilum.", {LES: -1}),
        ("No pneumonia, effusions, edema, pneumothorax, adenopathy, nodules or masses.",
         {PNA: 0, EFF: 0, EDE: 0, PNX: 0, LES: 0}),
    ],
    "lung opacity": [
        ("Patchy right basilar opacity.", {OPA: 1}),
        ("Streaky airspace disease.", {OPA: 1}),
        ("No infiltrate.", {OPA: 0}),
        ("Increased interstitial markings.", {OPA: 1}),
        ("The lungs are free of focal airspace disease.", {OPA: 0}),
        ("Apical scarring.", {OPA: 1}),
        ("Ground-glass opacification in both lungs.", {OPA: 1}),
        ("Hazy opacities are new.", {OPA: 1}),
    ],
    "support devices": [
        ("Right-sided PICC terminates in the SVC.", {DEV: 1}),
        ("Endotracheal tube in good position.", {DEV: 1}),
        ("Dual lead pacemaker.", {DEV: 1}),
        ("Kerley B lines are seen.", {DEV: None}),
        ("Left subclavian port-a-cath.", {DEV: 1}),
        ("Interval removal of the chest tube.", {DEV: 0}),
        ("The chest tube has been removed.", {DEV: 0}),
        ("No support devices.", {DEV: 0}),
        ("Pacer is seen with leads appropriately placed.", {DEV: 1}),
        ("This leads to better aeration.", {DEV: None}),
        ("Orthopedic hardware in the cervical spine.", {DEV: 1}),
        ("Prosthetic aortic valve.", {DEV: 1}),
    ],
    "scope of negation": [
        ("No A, B or C: no effusion, pneumothorax or consolidation.", {EFF: 0, PNX: 0, CON: 0}),
        ("There is no effusion; cardiomegaly is stable.", {EFF: 0, CAR: 1}),
        ("No acute abnormality other than mild cardiomegaly.", {CAR: 1}),
        ("No acute disease, stable cardiomegaly.", {CAR: 1}),
        ("Effusion (no pneumothorax) and atelectasis.", {EFF: 1, PNX: 0, ATE: 1}),
        ("Without effusion, edema or consolidation, the lungs are clear.",
         {EFF: 0, EDE: 0, CON: 0}),
        ("No evidence of active disease with mild cardiomegaly.", {CAR: 1}),
        ("The effusion, previously seen on the left, has resolved.", {EFF: 0}),
        ("Consolidation, effusion, and pneumothorax are absent.", {CON: 0, EFF: 0, PNX: 0}),
        ("Stable cardiomegaly, pneumothorax not seen.", {CAR: 1, PNX: 0}),
        ("The film does not show pneumothorax or effusion.", {PNX: 0, EFF: 0}),
        ("There isn't any pneumothorax.", {PNX: 0}),
        ("Cardiomegaly w/o edema.", {CAR: 1, EDE: 0}),
        ("There is no focal consolidation,\n pleural effusion or pneumothorax.",
         {CON: 0, EFF: 0, PNX: 0}),
        ("No effusion.No pneumothorax.Cardiomegaly.", {EFF: 0, PNX: 0, CAR: 1}),
        ("no pleural effusion . mild cardiomegaly . no pneumothorax .", {EFF: 0, CAR: 1, PNX: 0}),
        ("No opacity consistent with pneumonia.", {OPA: 0, PNA: 0}),
    ],
    "scope of uncertainty": [
        ("Opacity may represent atelectasis, pneumonia, or aspiration.",
         {OPA: 1, ATE: -1, PNA: -1}),
        ("Opacity may represent atelectasis without pneumothorax.", {ATE: -1, PNX: 0}),
        ("Possible pneumonia with effusion.", {PNA: -1, EFF: 1}),
        ("Possible left basilar pneumonia, cardiomegaly.", {PNA: -1, CAR: 1}),
        ("Consolidation and/or atelectasis.", {CON: -1, ATE: -1}),
        ("Atelectasis vs. infiltrate in the left base.", {ATE: -1, OPA: -1}),
        ("Effusion is possible on the left.", {EFF: -1}),
        ("Questionable nodule.", {LES: -1}),
        ("Left basilar pneumonia?", {PNA: -1}),
        ("One or two nodules in the left lung.", {LES: 1}),
        ("Right or left effusion.", {EFF: 1}),
        ("Differential includes pneumonia and edema.", {PNA: -1, EDE: -1}),
        ("There is no pneumothorax, possible small effusion.", {PNX: 0, EFF: -1}),
    ],
    "positive over uncertain over negative": [
        ("No effusion on the right. Possible effusion on the left.", {EFF: -1}),
        ("Possible effusion on the left. Effusion on the right.", {EFF: 1}),
        ("No pneumothorax on the left. Right pneumothorax.", {PNX: 1}),
    ],
    "sections that are not about the image": [
        ("INDICATION: Rule out pneumonia.\n\nFINDINGS: The lungs are clear. No effusion.",
         {PNA: None, EFF: 0}),
        ("HISTORY: Cough, CHF. IMPRESSION: No acute disease.", {EDE: None, NOF: 1}),
        ("COMPARISON: Chest x-ray with pneumothorax.\nFINDINGS: No effusion.", {PNX: None, EFF: 0}),
        ("HISTORY: Pneumothorax.\n \n The lungs are clear. Mild cardiomegaly.",
         {PNX: None, CAR: 1}),
        ("indication : pneumonia . findings : no effusion .", {PNA: None, EFF: 0}),
        ("Small effusion.\n\nRecommendations:\n- CT to assess for pneumonia\n- Follow-up for mass",
         {PNA: None, LES: None, EFF: 1}),
    ],
    "chat: labels and answers": [
        ("**Pneumothorax:** None seen.", {PNX: 0}),
        ("- **Pleural effusion**: present", {EFF: 1}),
        ("Pleural effusion : present\nPneumothorax : absent", {EFF: 1, PNX: 0}),
        ("Pneumothorax - negative", {PNX: 0}),
        ("Edema – possible", {EDE: -1}),
        ("| Finding | Status |\n|---|---|\n| Edema | Yes |\n| Pneumothorax | No |",
         {EDE: 1, PNX: 0}),
        ("Pneumothorax:\n- No visible pleural line", {PNX: 0}),
        ("### Pleural Effusion\nThe left costophrenic angle is blunted.", {EFF: 1}),
        ("1. **Cardiomegaly**: The heart size appears normal.", {CAR: 0}),
        ("Consolidation: Not seen\nEdema: Mild, bilateral", {CON: 0, EDE: 1}),
        ("Is there a pneumothorax? No.", {PNX: 0}),
        ("Is there a pneumothorax? Yes, on the left.", {PNX: 1}),
        ("Does this chest X-ray show edema?", {EDE: None}),
        ("There is no evidence of:\n- Pneumothorax\n- Pleural effusion\n- Fracture",
         {PNX: 0, EFF: 0, FRA: 0}),
        ("Findings:\n- Cardiomegaly\n- Pleural effusion", {CAR: 1, EFF: 1}),
        ("Differential diagnosis:\n- Pneumonia\n- Edema", {PNA: -1, EDE: -1}),
        ("✅ Pleural effusion\n❌ Pneumothorax", {EFF: 1, PNX: 0}),
        ("Pleural Effusion, Edema", {EFF: 1, EDE: 1}),
        ("Enlarged Cardiomediastinum: absent", {ECM: 0}),
        ("Lung Lesion", {LES: 1}),
        ("Pleural Other", {PLO: 1}),
        ("Support Devices", {DEV: 1}),
    ],
    "chat: hedges and statements": [
        ("Consolidation appears present in the left lower lobe.", {CON: 1}),
        ("Pneumothorax is absent.", {PNX: 0}),
        ("I do not see any pleural effusion or pneumothorax.", {EFF: 0, PNX: 0}),
        ("No, the X-ray does not show edema.", {EDE: 0}),
        ("No, pneumothorax is not present.", {PNX: 0}),
        ("Yes, there is a **pleural effusion** on the left side.", {EFF: 1}),
        ("As an AI, I cannot give a diagnosis, but the image shows bilateral pleural effusions.",
         {EFF: 1}),
        ("There are no signs of other issues (e.g., pneumothorax, large masses, or fractures).",
         {PNX: 0, LES: 0, FRA: 0}),
        ("The image shows signs of cardiomegaly and possible pulmonary edema.", {CAR: 1, EDE: -1}),
        ("Left-sided effusion; the right costophrenic angle is sharp with no effusion.", {EFF: 1}),
        ("There does not appear to be a pneumothorax.", {PNX: 0}),
        ("Pneumothorax does not appear to be present.", {PNX: 0}),
        ("A pneumothorax cannot be completely excluded.", {PNX: -1}),
        ("The presence of a cardiac pacemaker may partially obscure the view.", {DEV: 1}),
        ("I cannot determine whether there is a pneumothorax.", {PNX: None}),
        ("These findings are typical of conditions such as pneumonia or heart failure.",
         {PNA: None, EDE: None}),
        ("To determine the basis for diagnosing atelectasis, we analyze the image.", {ATE: None}),
        ("Small left effusion. If clinical concern for pneumonia persists, CT is advised.",
         {EFF: 1, PNA: None}),
    ],
    "chat: definitions are not findings": [
        ("Atelectasis is a condition where one or both lungs partially or completely collapse.",
         {ATE: None}),
        ("Pleural effusion refers to the buildup of excess fluid in the pleural cavity.",
         {EFF: None}),
        ("Pleural effusion is an abnormal collection of fluid between the lung and chest wall.",
         {EFF: None}),
        ("Atelectasis is partial or complete collapse of lung tissue.", {ATE: None}),
        ("On an X-ray, this might appear as an area of increased opacity.", {OPA: None}),
        ("Here is what to look for when pneumonia is suspected.", {PNA: None}),
        ("Pneumonia typically appears as an area of consolidation.", {PNA: None, CON: None}),
        ("Signs of edema include Kerley B lines.", {EDE: None}),
        ("Common causes include infection, heart failure, and malignancy.", {PNA: None, EDE: None}),
        ("1. **Atelectasis**: This is a condition in which the lung collapses.", {ATE: None}),
        ("The atelectasis is a consequence of the pleural effusion.", {ATE: 1, EFF: 1}),
        ("Atelectasis is noted with collapse of the right lower lobe.", {ATE: 1}),
        ("What to look for:\n- Pleural effusion: blunting of the angle\n- Atelectasis: volume loss",
         {EFF: None, ATE: None}),
    ],
}

EXACT = {
    "reports": [
        ("The heart is normal in size. The mediastinum is unremarkable. The lungs are clear.",
         {CAR: 0, ECM: 0, NOF: 1}),
        ("Heart size normal. No pneumothorax, pleural effusion, or focal airspace disease. Bony "
         "structures intact.",
         {CAR: 0, PNX: 0, EFF: 0, OPA: 0, NOF: 1}),
        ("Cardiomegaly and small bilateral pleural effusions. No pneumothorax.",
         {CAR: 1, EFF: 1, PNX: 0}),
        ("There is increased opacity within the right upper lobe with possible mass and associated "
         "area of atelectasis or focal consolidation. The cardiac silhouette is within normal "
         "limits. No pleural effusion or pneumothorax.",
         {OPA: 1, LES: -1, ATE: -1, CON: -1, CAR: 0, EFF: 0, PNX: 0}),
        ("1. Stable mild cardiomegaly. 2. Hyperexpanded but clear lungs.", {CAR: 1}),
        ("Lungs are clear. Right-sided pacemaker.", {DEV: 1, NOF: 1}),
    ],
    "no finding": [
        ("No acute cardiopulmonary abnormality.", {NOF: 1}),
        ("No acute cardiopulmonary process.", {NOF: 1}),
        ("Normal chest.", {NOF: 1}),
        ("No Finding", {NOF: 1}),
        ("The lungs are clear.", {NOF: 1}),
        ("No pneumothorax.", {PNX: 0, NOF: 1}),
        ("No acute findings. Chest tube in place.", {DEV: 1, NOF: 1}),
        ("No acute findings. Emphysema.", {}),
        ("Negative chest x-ray.", {NOF: 1}),
        ("Possible pneumonia.", {PNA: -1}),
        ("No hiatal hernia. Lungs are clear.", {NOF: 1}),
        ("", {}),
        ("   \n\n ", {}),
        ("XXXX XXXX.", {}),
        ("___ was informed.", {}),
        ("Please consult a physician.", {}),
        ("The weather is fine today.", {}),
    ],
}

LATER = {
    "report sentences": [
        ("The heart is top normal in size. The mediastinum is stable. Opacity is noted in the "
         "right base consistent with atelectasis and possibly a small effusion. The left lung is "
         "clear.",
         {CAR: 0, ECM: -1, OPA: 1, ATE: 1, EFF: -1}),
        ("There is stable prominence of the cardiac silhouette. Pulmonary vascularity is within "
         "normal limits.",
         {CAR: 1}),
        ("No alveolar consolidation, no findings of pleural effusion or pulmonary edema.",
         {CON: 0, EFF: 0, EDE: 0, NOF: 1}),
        ("There is no longer evidence for pulmonary edema.", {EDE: 0, NOF: 1}),
        ("Left pleural effusion with left basilar atelectasis or infiltrate. Heart size within "
         "normal limits.",
         {EFF: 1, ATE: -1, OPA: -1, CAR: 0}),
        ("Decreased left pleural effusion. No evidence of pneumothorax status post thoracentesis.",
         {EFF: 1, PNX: 0}),
        ("Right middle lobe pneumonia. Followup radiographs to document resolution of the "
         "pneumonia are recommended.",
         {PNA: 1}),
        ("No evidence for acute pneumonia or edema; chronic right pleural effusion.",
         {PNA: 0, EDE: 0, EFF: 1}),
        ("Cannot exclude small left pleural effusion. Otherwise, no acute cardiopulmonary disease.",
         {EFF: -1}),
        ("No large pneumothorax or effusion, although small effusions can't be excluded given the "
         "supine positioning.",
         {PNX: 0, EFF: -1}),
        ("Bibasilar opacities likely reflect atelectasis, though infection cannot be excluded in "
         "the proper clinical setting.",
         {OPA: 1, ATE: 1, PNA: -1}),
        ("The lungs are clear of focal airspace disease, pneumothorax, or pleural effusion.",
         {OPA: 0, PNX: 0, EFF: 0, NOF: 1}),
        ("Low lung volumes accentuate the cardiomediastinal silhouette, which is likely "
         "top-normal in size.",
         {ECM: 0, NOF: 1}),
        ("Increased retrocardiac opacity, atelectasis or pneumonia. Mild vascular congestion. "
         "Unchanged moderate cardiomegaly.",
         {OPA: 1, ATE: -1, PNA: -1, EDE: -1, CAR: 1}),
        ("The effusion has nearly completely resolved.", {EFF: 1}),
        ("The heart is not large.", {CAR: 0, NOF: 1}),
        ("The effusion is not large.", {EFF: 1}),
        ("The heart does not appear enlarged.", {CAR: 0, NOF: 1}),
        ("The heart is no longer enlarged.", {CAR: 0, NOF: 1}),
        ("The heart is not well seen.", {CAR: -1}),
        ("Increased cardiothoracic ratio.", {CAR: 1}),
        ("Heart size cannot be assessed due to adjacent opacity.", {CAR: -1, OPA: 1}),
        ("Small bilateral effusions not seen on prior exam.", {EFF: 1}),
        ("There is a small effusion that was not present previously.", {EFF: 1}),
        ("Without comparison, pneumonia cannot be excluded.", {PNA: -1}),
        ("No prior studies available; mild cardiomegaly and edema.", {CAR: 1, EDE: 1}),
        ("Normal cardiac silhouette without pulmonary edema or effusion, mild basilar atelectasis.",
         {CAR: 0, EDE: 0, EFF: 0, ATE: 1}),
        ("Pulmonary vasculature is normal, heart enlarged.", {CAR: 1}),
        ("Mild pulmonary edema, cardiomegaly, and small effusions are unchanged.",
         {EDE: 1, CAR: 1, EFF: 1}),
        ("The trachea is central and there is no mediastinal widening or lymphadenopathy.",
         {ECM: 0, NOF: 1}),
        ("Frontal views with overlying cardiac monitor leads show an enlarged cardiac silhouette.",
         {DEV: 1, CAR: 1}),
        ("Question left lower lobe infiltrate. The heart is not enlarged, and there are no "
         "effusions.",
         {OPA: -1, CAR: 0, EFF: 0}),
    ],
    "whole reports": [
        ("                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
         " INDICATION:  ___ year old woman with dyspnea  // r/o pneumonia\n \n"
         " COMPARISON:  ___ with pneumothorax\n \n FINDINGS: \n \n"
         " PA and lateral views of the chest.   There is no focal consolidation,\n"
         " effusion, or pneumothorax.  The cardiomediastinal silhouette is normal.  No free air"
         " below the right hemidiaphragm is\n seen.\n \n"
         " IMPRESSION: \n \n No acute intrathoracic process.\n",
         {CON: 0, EFF: 0, PNX: 0, ECM: 0, NOF: 1}),
        ("Lines/tubes: ET tube 3 cm above carina. Lungs: bibasilar atelectasis. Pleura: no "
         "effusion, no pneumothorax. Heart/mediastinum: stable.",
         {DEV: 1, ATE: 1, EFF: 0, PNX: 0, CAR: -1, ECM: -1}),
    ],
    "chat answers": [
        ("**Findings:**\n\n1. **Lungs:** Clear bilaterally. No consolidation.\n"
         "2. **Heart:** Normal size.\n3. **Pleura:** No effusion or pneumothorax.\n\n"
         "**Impression:** Normal chest X-ray.",
         {CON: 0, CAR: 0, EFF: 0, PNX: 0, NOF: 1}),
        ("I can see:\n\n**Cardiomegaly** - The heart appears enlarged.\n\n"
         "**Pleural effusion** - There is blunting of both angles.\n\n"
         "**Pneumothorax** - I don't see evidence of this.", {CAR: 1, EFF: 1, PNX: 0}),
        ("1. **Atelectasis**: Not present.\n2. **Cardiomegaly**: Present\n"
         "3. **Consolidation**: Uncertain\n4. **Edema**: No\n"
         "5. **Pneumonia**: Cannot be excluded\n6. **Pneumothorax**: Negative",
         {ATE: 0, CAR: 1, CON: -1, EDE: 0, PNA: -1, PNX: 0}),
        ("Atelectasis: 1\nEdema: 0\nPneumonia: -1", {ATE: 1, EDE: 0, PNA: -1}),
        ("### Key Findings\n- **Bilateral pleural effusions**: Blunted costophrenic angles\n\n"
         "### Negative findings\n- Pneumothorax\n- Fracture\n\n"
         "### Recommendations\n- Echocardiography to evaluate for heart failure",
         {EFF: 1, PNX: 0, FRA: 0}),
        ("If there is a pneumothorax, you would see a visible pleural line. In this image, no "
         "such line is visible.",
         {}),
        ("Pneumonia can cause consolidation on chest X-ray. In this case, there is a "
         "consolidation in the right lower lobe.",
         {CON: 1}),
        ("The patient has been diagnosed with pneumonia. The basis for the diagnosis is the "
         "consolidation in the right lower lobe.",
         {CON: 1}),
        ("Pneumothorax? None seen.", {PNX: 0, NOF: 1}),
        ("Pneumothorax?", {PNX: -1}),
        ("Both pneumonia and heart failure are possible.", {PNA: -1, EDE: -1, CAR: -1}),
        ("Atelectasis (present), Edema (absent), Pneumothorax (absent)", {ATE: 1, EDE: 0, PNX: 0}),
        ("The X-ray is negative for pneumonia and positive for cardiomegaly.", {PNA: 0, CAR: 1}),
        ("The costophrenic angles are sharp bilaterally, which rules out significant pleural "
         "effusion.",
         {EFF: 0, NOF: 1}),
        ("Pleural effusion: The right costophrenic angle is clear.", {EFF: 0, NOF: 1}),
        ("Signs of cardiomegaly in this image include an enlarged silhouette.", {CAR: 1}),
        ("Also seen is a collection of pleural fluid.", {EFF: 1}),
        ("Potential differential diagnoses include pneumonia, pulmonary edema, and lung cancer.",
         {PNA: -1, EDE: -1, LES: -1}),
        ("It's unlikely that pneumothorax is present.", {PNX: 0, NOF: 1}),
        ("Yes", {}),
        ("No", {}),
        ("Normal.", {NOF: 1}),
        ("Low likelihood of pneumonia.", {PNA: 0, NOF: 1}),
        ("There is nothing to suggest a pneumothorax.", {PNX: 0, NOF: 1}),
        ("Pneumothorax (No)\nEdema (Yes)", {PNX: 0, EDE: 1}),
        ("There is no evidence of pneumothorax, and pneumonia cannot be excluded.",
         {PNX: 0, PNA: -1}),
        ("No pneumothorax and a small effusion cannot be ruled out.", {PNX: 0, EFF: -1}),
        ("Consolidation, effusion, and pneumothorax cannot be excluded.",
         {CON: -1, EFF: -1, PNX: -1}),
        ("While I can't provide a diagnosis, I can see bilateral opacities.", {OPA: 1}),
        ("Although I am unable to diagnose, I notice a left pleural effusion.", {EFF: 1}),
        ("I am not able to give a diagnosis, but no effusion is visible.", {EFF: 0, NOF: 1}),
        ("Edema: 0.03\nPneumonia: 85%", {}),
    ],
    "chat: yes or no behind the question": [
        ("Does this chest X-ray show edema?\nYes", {EDE: 1}),
        ("Does this chest X-ray show edema? Yes.", {EDE: 1}),
        ("Does this chest X-ray show edema?\n\n**No**", {EDE: 0, NOF: 1}),
        ("Does this chest X-ray show pneumonia? Possibly.", {PNA: -1}),
        ("Does this chest X-ray show pneumonia? Uncertain", {PNA: -1}),
        ("Does this chest X-ray show pneumonia? It cannot be excluded.", {PNA: -1}),
        ("Does this chest X-ray show pneumothorax? Yes, there is a small one.", {PNX: 1}),
        ("Does this chest X-ray show lung opacity? I cannot determine this.", {}),
    ],
    "left and right": [
        ("The effusion is no longer seen on the left but persists on the right.", {EFF: 1}),
        ("The effusion has resolved on the left but persists on the right.", {EFF: 1}),
        ("Pleural effusion is no longer present on the left, but remains present on the right.",
         {EFF: 1}),
        ("The effusion is absent on the left but is still seen on the right.", {EFF: 1}),
        ("The effusion persists on the left but is no longer seen on the right.", {EFF: 1}),
        ("No pneumothorax is seen but the effusion persists.", {PNX: 0, EFF: 1}),
        ("Pneumothorax is absent, but effusion persists on the right.", {PNX: 0, EFF: 1}),
        ("The pneumothorax has resolved but the chest tube remains.", {PNX: 0, DEV: 1, NOF: 1}),
        ("Pleural effusion: none on the left, small on the right", {EFF: 1}),
        ("Pleural effusion: left: no, right: yes", {EFF: 1}),
        ("Effusion: absent on the right, possible on the left", {EFF: -1}),
        ("Effusion: none on the left, none on the right", {EFF: 0, NOF: 1}),
        ("Pneumothorax: none seen, left and right lungs fully expanded", {PNX: 0, NOF: 1}),
        ("- Left lung: no effusion\n- Right lung: small effusion", {EFF: 1}),
        ("Left: effusion. Right: none.", {EFF: 1}),
        ("Right pleural effusion: absent; left pleural effusion: present", {EFF: 1}),
    ],
    "chat: lists by state": [
        ("Absent:\n- Pneumothorax\n- Edema\n\nPresent:\n- Effusion", {PNX: 0, EDE: 0, EFF: 1}),
        ("**Uncertain:**\n- Pneumonia\n**Ruled out:**\n- Pneumothorax", {PNA: -1, PNX: 0}),
        ("Present: effusion, atelectasis\nAbsent: pneumothorax, edema",
         {EFF: 1, ATE: 1, PNX: 0, EDE: 0}),
        ("Pneumothorax: Absent\nEffusion: Possible", {PNX: 0, EFF: -1}),
        ("Negative: pneumothorax. Heart size is normal.", {PNX: 0, CAR: 0, NOF: 1}),
    ],
    "chat: JSON": [
        ('{"absent": ["Pneumothorax"], "present": ["Edema"], "uncertain": ["Pneumonia"]}',
         {PNX: 0, EDE: 1, PNA: -1}),
        ('{"positive": ["Edema"], "negative": ["Pneumothorax", "Fracture"]}',
         {EDE: 1, PNX: 0, FRA: 0}),
        ('{"findings": {"Pleural Effusion": {"left": "absent", "right": "present"}}, '
         '"recommendation": "CT for pneumonia"}',
         {EFF: 1}),
        ('{"diagnosis": "Pneumonia", "differential": ["Edema"]}', {PNA: 1, EDE: -1}),
        ('{"Pneumothorax": "absent", "Edema": "present", "Pneumonia": null}', {PNX: 0, EDE: 1}),
        ('{"pleural_effusion": true, "LungOpacity": false, "edema": 0, "pneumonia": -1, '
         '"Atelectasis": 1}',
         {EFF: 1, OPA: 0, EDE: 0, PNA: -1, ATE: 1}),
        ('```json\n{"findings": ["Cardiomegaly", "No pneumothorax"], '
         '"impression": "Possible mild edema."}\n```',
         {CAR: 1, PNX: 0, EDE: -1}),
        ('Here is my answer:\n```json\n{"findings": [{"finding": "Edema", "present": true, '
         '"confidence": 0.9},\n {"finding": "Pneumothorax", '
         '"present": false}]}\n```\nThis is not medical advice.', {EDE: 1, PNX: 0}),
        ('{"Edema": {"present": false, "evidence": "no Kerley lines"}, '
         '"Pneumonia": {"status": "uncertain", "location": "left base"}}',
         {EDE: 0, PNA: -1}),
        ('["Cardiomegaly", "Pleural Effusion"]', {CAR: 1, EFF: 1}),
        ('{"positive": ["Edema"], "negative findings": ["Pneumothorax", "Fracture"]}',
         {EDE: 1, PNX: 0, FRA: 0}),
        ('{"heart": "mildly enlarged", "lungs": "Clear. No consolidation."}', {CAR: 1, CON: 0}),
        ('{"Pneumonia": 0.03}', {}),
        ('{"answer": "Yes"}', {}),
        ("{}", {}),
        ('{"Pneumothorax": "absent", "Edema": ', {PNX: 0, NOF: 1}),
    ],
}

REFUSALS = [
    "As an AI, I'm not capable of providing medical diagnoses.",
    "I'm sorry, but I can't provide a diagnosis from this image.",
    "I am unable to interpret medical images.",
    "I\u2019m unable to interpret X-rays. Please consult a radiologist.",
    "I cannot analyze this image.",
    "I can't help with interpreting medical images.",
    "I'm not able to determine whether there is a pneumothorax in this image.",
    "As a language model I do not have the ability to view images. Pleural effusion refers to "
    "fluid around the lung.",
    "I cannot assist with that request.",
    "I am not qualified to diagnose. In general, pneumonia may appear as a consolidation.",
    "I don't see an image attached.",
]
NOT_REFUSALS = [
    "As an AI, I can't replace a physician, but the image shows a left pleural effusion.",
    "I'm not a doctor, but there is no pneumothorax.",
    "I cannot provide a formal diagnosis. The lungs are clear.",
    "There is a small pleural effusion. I cannot see a pneumothorax.",
    "No acute cardiopulmonary abnormality.",
    "The patient was unable to stand. Mild cardiomegaly.",
    "",
    "Atelectasis is a condition where the lung collapses.",
]


def values(text):
    return {finding: reading.value for finding, reading in read_findings(text).items()}


def cases(table):
    return [pytest.param(text, expected, id=f"{group}: {text[:60]!r}")
            for group, rows in table.items() for text, expected in rows]


def test_there_are_at_least_150_distinct_cases():
    texts = {text for table in (MATTERS, EXACT) for rows in table.values() for text, _ in rows}
    assert len(texts) >= 150, "not counting LATER"


@pytest.mark.parametrize("text, expected", cases(MATTERS))
def test_findings_that_matter_are_read(text, expected):
    read = values(text)
    assert {finding: read.get(finding) for finding in expected} == expected


@pytest.mark.parametrize("text, expected", cases(EXACT) + cases(LATER))
def test_the_whole_text_is_read(text, expected):
    assert values(text) == expected


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", NOT_REFUSALS)
def test_a_text_with_a_finding_or_without_a_refusing_phrase_is_no_refusal(text):
    assert not is_refusal(text)


def test_reading_names_the_sentence_that_decided():
    read = read_findings("Heart size is normal. No effusion on the right. "
                         "**Large** left pleural\neffusion. Effusion on the left.")
    assert read[EFF] == (1, "**Large** left pleural effusion.")
    assert read[CAR] == (0, "Heart size is normal.")


def test_only_the_fourteen_findings_and_three_values_occur():
    assert len(FINDINGS) == 14
    tables = MATTERS, EXACT, LATER
    for text, _ in [row for table in tables for rows in table.values() for row in rows]:
        read = values(text)
        assert set(read) <= set(FINDINGS)
        assert set(read.values()) <= {1, 0, -1}
        assert read.get(NOF, 1) == 1


def of_words_alone(case):
    """Whether a case's text is about its words, not about letter case or marks."""
    text, _ = case.values
    return not any(mark in text for mark in ("FINDINGS:", "IMPRESSION:", "|", "#", ".No"))


@pytest.mark.parametrize("text, expected", filter(of_words_alone, cases(MATTERS)))
def test_letter_case_and_bold_do_not_change_the_reading(text, expected):
    names = r"\b(effusions?|pneumothorax|atelectasis|edema)\b"
    read = values(re.sub(names, r"**\1**", text.lower()))
    assert {finding: read.get(finding) for finding in expected} == expected


def test_reading_is_deterministic_and_keeps_no_state():
    texts = [text for rows in MATTERS.values() for text, _ in rows]
    first = [read_findings(text) for text in texts]
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    for index in order:
        assert read_findings(texts[index]) == first[index]


@pytest.mark.parametrize("piece", [
    "a", " ", "\n", ".", ":", "- ", "(", ")", "*", "_", "no ", "no change ", "no significant ",
    "is ", "effusion ", "no effusion, ", "effusion or ", "cannot be ", "X: ", "- no:\n",
    "effusion: ", "heart is normal and ", "| ", "#", "((no effusion", "may ", "?", "1. ", ", ",
    "pleural ", "A\n", "[", '{"a":',
    '```json\n{"edema": 1}\n```', "left: no, right ", "no effusion, and ", "a-",
    "n't ", "As an AI ", "I cannot ", "\u00e9", "\x00", "\ud800", "effusion is not seen ",
])
def test_adversarial_text_of_100_kb_finishes(piece):
    text = piece * (100_000 // len(piece))
    read_findings(text)
    is_refusal(text)


def appendix_b():
    path = os.environ.get("PAPER_TXT")
    if not path:
        pytest.skip("PAPER_TXT names no copy of the paper's text")
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    names = ["Radiology Report", "Claude Sonnet-4", "GPT-5-nano", "GLM-4.5V",
             "Gemini-2.5-flash-lite", "Moonshot-v1", "Qwen-VL-Max", "Grok-4",
             "C IMPLEMENTATION DETAILS"]
    starts = [lines.index(name, lines.index("B CXR-MAX DATASET")) for name in names]
    return {name: "\n".join(lines[start + 1:end])
            for name, start, end in zip(names, starts, starts[1:])}


def test_appendix_b_only_moonshot_refuses():
    assert [name for name, text in appendix_b().items() if is_refusal(text)] == ["Moonshot-v1"]


def test_appendix_b_moonshot_says_nothing_about_the_image():
    assert read_findings(appendix_b()["Moonshot-v1"]) == {}


def test_appendix_b_the_other_six_and_the_report_have_both_diagnoses():
    for name, text in appendix_b().items():
        if name != "Moonshot-v1":
            read = values(text)
            assert (read.get(ATE), read.get(EFF)) == (1, 1), name
            assert NOF not in read, name


def test_appendix_b_details():
    read = {name: values(text) for name, text in appendix_b().items()}
    report = read["Radiology Report"]
    assert (report[PNX], report[DEV], report[ECM]) == (0, 1, 0)
    with_devices = "Claude Sonnet-4", "GPT-5-nano", "Qwen-VL-Max", "Grok-4"
    assert all(read[name][DEV] == 1 for name in with_devices)
    assert read["Qwen-VL-Max"][CAR] == 1
    assert PNA not in read["Qwen-VL-Max"]
    grok = read["Grok-4"]
    assert (grok[PNX], grok[FRA], grok[LES], grok[PNA], grok[CON]) == (0, 0, 0, 0, 0)


def test_scores_are_micro_over_positive_findings():
    predicted = [{EFF: 1, PNX: 0, ATE: 1}, {EFF: 1}, {}]
    reference = [{EFF: 1, PNX: 1}, {EFF: 0, ATE: 0}, {ATE: 1}]
    scores = finding_scores(predicted, reference)
    assert (scores["tp"], scores["fp"], scores["fn"]) == (1, 2, 2)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(1 / 3)
    effusion = scores["per_finding"][EFF]
    assert (effusion["precision"], effusion["recall"]) == (0.5, 1.0)
    assert effusion["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("uncertain, counts", [
    ("negative", (0, 1, 1)), ("positive", (2, 0, 0)), ("ignore", (0, 0, 0))])
def test_uncertain_findings_follow_the_policy(uncertain, counts):
    scores = finding_scores([{EFF: -1}, {EFF: 1}], [{EFF: 1}, {EFF: -1}], uncertain=uncertain)
    assert (scores["tp"], scores["fp"], scores["fn"]) == counts


def test_scores_without_a_denominator_are_none():
    scores = finding_scores([{}], [{EFF: 0}])
    assert (scores["precision"], scores["recall"], scores["f1"]) == (None, None, None)
    assert finding_scores([{EFF: 1}], [{}])["recall"] is None
    assert finding_scores([{EFF: 1}], [{}])["f1"] == 0


def test_scores_can_be_limited_to_some_findings():
    assert finding_scores([{EFF: 1, ATE: 1}], [{EFF: 1}], findings=[EFF])["precision"] == 1
    assert set(finding_scores([{}], [{}])["per_finding"]) == set(FINDINGS)


def test_scores_refuse_bad_input():
    with pytest.raises(ValueError, match="2 predicted.*1 reference"):
        finding_scores([{}, {}], [{}])
    with pytest.raises(ValueError, match="no texts"):
        finding_scores([], [])
    with pytest.raises(ValueError, match="uncertain"):
        finding_scores([{}], [{}], uncertain="maybe")
    with pytest.raises(ValueError, match="Effusions"):
        finding_scores([{"Effusions": 1}], [{}])
    with pytest.raises(ValueError, match="2"):
        finding_scores([{EFF: 2}], [{}])
