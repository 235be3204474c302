"""Which of the 14 CheXpert / MIMIC-CXR findings a text asserts about a chest radiograph: read by rules, without a model.

    read_findings("No pneumothorax. Small left effusion, possibly pneumonia.")
    -> {"Pneumothorax": (0, ...), "Pleural Effusion": (1, ...), "Pneumonia": (-1, ...), "Support Devices" and others absent}

It reads radiology reports and answers of chat models. A text is cut into sentences and, at colons and dashes, into a label and
what is said of it. In each piece one regular expression finds mentions and cues; one sweep to the right carries "no", "possible",
"history of" from the cue to what follows, one sweep to the left carries "is absent", "cannot be excluded", "is enlarged" back to
what precedes; conjunctions and verbs end a scope. Both sweeps and the search are linear in the length of the text.

The conventions are those of the CheXpert labeler (Irvin et al. 2019, https://github.com/stanfordmlgroup/chexpert-labeler) and of
NegBio (Peng et al. 2018); its vocabulary of findings carries over, its parser and code do not. Worth knowing:

 1. Over the mentions of a finding, positive > uncertain > negative. "No new X" and "no definite X" are uncertain.
 2. "No Finding" is 1 if no other finding except Support Devices and no other abnormality (emphysema, granuloma, hernia, ...) is positive
    or uncertain; else it is absent, never 0. Unlike the labeler's, it needs a text that says something: a finding denied, "lungs are
    clear", "no acute process". An empty text gives {}.
 3. "likely", "consistent with", "suggestive of" are positive; "A or B", "A versus B", "probable", "may represent" are uncertain.
 4. Heart size: "upper limits of normal" is 0, "borderline" -1, "borderline enlarged" 1, "stable" alone -1.
 5. Heart failure is Edema and uncertain Cardiomegaly; vascular congestion is uncertain Edema; fibrosis is Pleural Other.
 6. Ours: pleural plaques are Pleural Other; "history of X", questions, definitions, recommendations and the sections in
    SKIPPED_SECTIONS (indication, comparison, ...) say nothing about the image.
"""

import re
from typing import NamedTuple

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion", "Lung Opacity",
            "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices")
POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1

# Phrases are lower case, separated by "|"; hyphens inside words have become blanks. "*" is any ending of a word, "~" up to three of DEGREE.
# Where two phrases start at the same place the longer one wins, so "pericardial effusion" hides the "effusion" in it.

MENTIONS = {
    "Atelectasis": "atelecta*|collapse*|collapsing",
    "Cardiomegaly": "cardiomegal*|cardiac enlargement|heart enlargement",
    "Consolidation": "consolidat*",
    "Edema": "edema*|oedema*|fluid overload",
    "Enlarged Cardiomediastinum": "mediastinal widening|mediastinal enlargement|mediastinal prominence",
    "Fracture": "fractur*|broken rib*",
    "Lung Lesion": "mass|masses|nodule*|nodular densit*|nodular opaci*|lung lesion*|pulmonary lesion*|cavitary lesion*|lump|lumps|neoplas*"
                   "|tumor*|tumour*|carcinoma*|lung cancer",
    "Lung Opacity": "opaci*|infiltrat*|airspace disease|air space disease|increased densit*|interstitial marking*|interstitial prominence"
                    "|interstitial pattern|interstitial lung|interstitial disease|reticula*|scar|scars|scarring|ground glass|haziness"
                    "|peribronchial thickening|bronchial wall thickening",
    "Pleural Effusion": "effusion*|pleural fluid|fluid in the pleural space*|hydrothora*|hemothora*|hydropneumothora*|pleural or pericardial effusion*"
                        "|pericardial or pleural effusion*",
    "Pleural Other": "pleural thickening|pleural scar*|pleural parenchymal scar*|pleuroparenchymal scar*|pleural plaque*|apical cap*|fibrosis"
                     "|fibrothorax|pleural other",
    "Pneumonia": "pneumonia*|bronchopneumonia*|infection*|infectious",
    "Pneumothorax": "pneumothora*|hydropneumothora*|ptx",
    "Support Devices": "pacemaker*|pacer*|icd|aicd|defibrillator*|picc|central line*|venous line*|arterial line*|central venous|jugular line*"
                       "|subclavian line*|tube|tubes|catheter*|port a cath*|portacath*|mediport*|chest port|infusion port|cannula*|drain|drains|pigtail"
                       "|stent|stents|hardware|arthroplast*|prosthe*|valve replacement*|mechanical valve*|artificial valve*|replaced valve*|device*"
                       "|support apparatus|supporting equipment|support equipment|lines and tubes|lines or tubes|lines, tubes|ecg lead*|ekg lead*"
                       "|pacing lead*|monitoring lead*|electrode*|skin marker*|fiducial*|surgical plate*|screw|screws|spinal fixation|fixation"
                       "|embolization coil*|tracheostomy|endotracheal|nasogastric|dobhoff|swan ganz|balloon pump|iabp|lvad|stimulator",
}
# Asserted, these are still only a hint of the finding.
WEAK_MENTIONS = {"Edema": "vascular congestion|pulmonary congestion|venous congestion|congestive change*|vascular prominence|indistinctness"}
HEART_FAILURE = "chf|heart failure|congestive heart failure|congestive failure|cardiac failure"
# Organs that say nothing by themselves: the finding depends on a status word ("enlarged", "normal", "stable").
ANATOMY = {
    "Cardiomegaly": "heart|hearts|heart size|cardiac size|cardiac silhouette*|heart silhouette|cardiac shadow|heart shadow|cardiac contour*"
                    "|heart contour*|cardiac outline|cardiac and|cardiac,",
    "Enlarged Cardiomediastinum": "mediastinum|cardiomediastinum|cardiomediastinal|cardio mediastinal|mediastinal contour*|mediastinal silhouette*"
                                  "|mediastinal structures|mediastinal size|mediastinal width|mediastinal configuration|mediastinal border*"
                                  "|mediastinal outline*|mediastinal and|mediastinal,|pericardial silhouette",
}
# Not one of the 14, but a film that shows it is not "No Finding".
OTHER_ABNORMALITIES = (
    "emphysema*|copd|hyperinflat*|hyperexpan*|granuloma*|calcifi*|scolio*|kyphosis|kyphotic|degenerat*|spondyl*|osteophyt*|osteopen*|hernia*"
    "|eventration|volume loss|loss of volume|elevat*|blunt*|bronchiecta*|bulla*|bullous|bleb*|cavit*|metasta*|adenopathy|lymphadenopathy"
    "|cephalization|aneurysm*|atherosclero*|pneumomediastinum|pneumoperitoneum|free air|deformit*|contusion*|hemorrhage|hematoma|aspiration"
    "|bronchit*|bronchiolit*|asthma*|cuffing|thickening|arthritis|arthropathy|hypertension|foreign body|bullet*"
)
NOT_MENTIONS = (  # they contain a phrase above or below and are something else
    "pericardial effusion*|joint effusion*|calcified nodul*|mass effect|body mass|kerley b lines|soft tissue edema|subcutaneous edema|leg edema"
    "|peripheral edema|vertebral collapse|vertebral body collapse|vertebra* collapse|collapse of vertebra*|collapsed vertebra*|heart rate"
    "|heart disease|not only|no doubt|no ~ increase|no ~ decrease|no ~ worsening|no ~ progression|no ~ improvement|not ~ displaced|not ~ large"
    "|not ~ larger|not ~ smaller|not ~ worse|consistent with|compatible with|keeping with|associated with|along with|together with|when compared"
    "|that is|that are|which is|which are|that was|which was|or two|or three|or more|partial resolution of|near complete resolution of"
    "|nearly complete resolution of|incomplete resolution of|not ~ resolved|nearly resolved|partially resolved|incompletely resolved"
)
OVER = ("over the|overlying the|overlies the|behind the|projecting over the|in the|into the|within the").split("|")  # a place, not a subject
PLACES = "heart|left heart|right heart|cardiac silhouette|mediastinum|superior mediastinum|cardiac shadow".split("|")

DEGREE = ("significant|significantly|appreciable|appreciably|interval|substantial|substantially|obvious|clearly|definite|definitely|definitively"
          "|entirely|completely|fully|totally|confidently|reliably|accurately|adequately|be|been|to|have|also|any|major|well|strongly|still")

CUES = {
    # To the right: they rule what follows.
    "neg": "no|not|without|negative for|free of|free from|clear of|cleared of|absence of|lack of|devoid of|denies|neither|nor|never|none of"
           "|resolution of|clearing of|removal of|rather than|instead of|as opposed to|excludes|fails to|negative findings|pertinent negatives"
           "|unremarkable for|cannot ~ see|cannot ~ identify|cannot ~ detect",
    "unc": "may|might|could|would|can be|can represent|can reflect|can indicate|suspicious for|suspicion of|suspicion for|suspect|concern for"
           "|concerns for|concerning for|worrisome for|question of|suggestion of|favor*|favour*|consider|differential|whether|rule out|to exclude"
           "|query|correlate for|correlation for|correlate clinically",
    "unc!": "no new|without new|no definite|without definite|cannot ~ exclude|cannot ~ rule out|not ~ exclude|not ~ rule out|unable to exclude"
            "|unable to rule out|no evidence to rule out",
    "ign": "history of|if|if there|when|evaluate for|evaluation for|evaluation of|assess for|assessment for|look for|looking for|check for"
           "|monitor for|monitoring for|screen for|recommend*|basis for|basis of|to determine|diagnosed with|diagnosed as|risk of|risk for|in case of"
           "|in cases of|in patients with|symptoms of|cannot ~ determine|cannot ~ confirm|cannot ~ diagnose|cannot ~ assess|cannot ~ tell"
           "|cannot ~ say|cannot ~ interpret|cannot ~ provide|cannot ~ comment|not able to|unable to|not capable of",
    "example": "conditions such as|diseases such as|causes such as|processes such as|diagnoses such as|conditions like",
    # To the left: they rule what precedes.
    "neg<": "not ~ seen|not ~ present|not ~ identified|not ~ evident|not ~ visible|not ~ visualized|not ~ noted|not ~ demonstrated|not ~ detected"
            "|not ~ appreciated|not ~ apparent|not ~ found|not ~ shown|not ~ observed|not ~ suspected|not ~ suggested|excluded|ruled out|none|nil",
    "unc<": "cannot ~ excluded|cannot ~ ruled out|not ~ excluded|not ~ ruled out|difficult to exclude|hard to exclude|should ~ considered"
            "|could ~ considered|may ~ considered|a consideration|a possibility|in the differential|may ~ present|might ~ present|could ~ present"
            "|may have this appearance|could have this appearance|of concern|questioned|incompletely evaluated|not clearly seen|not well seen",
    "unseen": "not ~ evaluated|not ~ assessed|cannot ~ evaluated|cannot ~ assessed|difficult to evaluate|difficult to assess|poorly evaluated"
              "|poorly assessed|poorly visualized|not well visualized|limited evaluation",
    # Before a noun to the right, after a verb to the left: "resolved effusion", "effusion has resolved".
    "neg<>": "resolved|cleared|removed|no longer|unlikely|absent|negative|not ~ appear",
    "unc<>": "possible|possibly|probable|probably|questionable|suspected|potential|potentially|presumed|presumably|perhaps|maybe|equivocal"
             "|less likely|conceivable|conceivably",
    "normal": "normal|unremarkable|within normal limits|upper limits of normal|upper limit of normal|upper limits normal|top normal|wnl",
    "abnormal": "enlarged|enlargement|enlarging|widened|widening|wide|prominent|prominence|increased|large|dilated|bigger",
    "borderline": "borderline|accentuated|exaggerated|magnified|obscured",
    "stable": "stable|unchanged|unaltered|similar|no ~ change*|not ~ changed|without ~ change*",
    # The rest shapes scopes.
    "clear": "clear|well aerated|well expanded",
    "affirm": "yes|present|seen|noted|identified|visible|visualized|evident|observed|detected|decreased|improved|worsened|persist*|larger|smaller",
    "copula": "is|are|was|were|has|have|had|remain*|appear*",
    "verb": "show*|demonstrate*|reveal*|indicates|suggests|contains",
    "purpose": "to suggest|to indicate|to explain|to support",
    "or": "or|and/or",
    "versus": "versus|vs",
    "and": "and|as well as",
    "with": "with",
    "break": "but|however|although|though|except|other than|aside from|apart from|besides|while|whereas|despite|given|because|there is|there are"
             "|there was|there were|there has been",
    "disease": "abnormalit*|disease|diseases|process|processes|finding|findings|patholog*",
    "noun": "lung|lungs|aorta|aortic|hila|hilar|hilum|vascularity|vasculature|diaphragm*|hemidiaphragm*|trachea|bone|bones|bony|osseous|chest|thorax"
            "|rib|ribs|spine|exam|examination|study|radiograph|x ray|film|image|structures|angle|angles|pleura|pleural space*|crowding|artifact",
}
# After a comma or "and" these begin a new statement: "no pneumothorax, stable cardiomegaly".
CLAUSE_STARTS = ("there|the|this|it|stable|unchanged|persistent|mild|mildly|minimal|moderate|moderately|severe|trace|small|improved|improving|worsening"
                 "|again|possible|possibly|probable|probably|likely|questionable|may")

# Sentences about medicine in general.
_SORT = "a|an|the|or|partial|complete|abnormal|excess|medical|common|serious|general|lung|fluid|type|kind|form|of"
GENERIC = (
    r"\brefers? to\b|\b(?:is|are) (?:defined as|characteri[sz]ed by|typically|usually|often|commonly|generally)\b|\bis an? (?:\w+ ){0,2}condition\b",
    r"^(?!there|the |this|these|that|it |key|main)(?:[\w()]+ ){1,5}(?:is|are|occurs|means) (?:(?:" + _SORT + r") ){0,5}"
    r"(?:condition|collection|accumulation|build ?up|collapse|infection|inflammation|enlargement|swelling|presence of (?:air|fluid|gas|excess))",
    r"\b(?:may|might|can|could|would|typically|often|usually|commonly|generally) (?:appear|present|manifest|show up)s? (?:as|on|in|with)\b",
    r"\bto look (?:for|out)\b|\bwhen (?:\w+ ){1,6}(?:is|are) suspected\b|\bgeneral (?:information|overview|guidance|knowledge)\b",
    r"\b(?:signs?|features|findings|symptoms) of (?:\w+ ){1,4}(?:include|are)\b|\b(?:common|other|typical|possible) causes\b|\bcauses include\b",
    r"\b(?:can be|often|usually|typically|commonly) caused by\b|\bthis can cause\b",
    r"\ba normal chest (?:\w+ ){0,2}(?:shows?|would|has|should|typically|usually)\b",
)
SKIPPED_SECTIONS = (r"(?:clinical )?(?:indications?|history|information|data|context)|reason for (?:the |this )?(?:exam|examination|study|visit)"
                    r"|comparisons?|techniques?|procedure|exam|examination|study|views?|recommendations?|next steps|follow up|disclaimer")
SECTIONS = (r"(?:key |main |radiographic |image )?(?:findings?|observations?)|impressions?|conclusions?|reports?|interpretation|results?|summary"
            r"|assessment|diagnosis|answer")
REFUSALS = (
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\b(?:i|we) (?:am|are|'m|'re) (?:\w+ )?(?:unable|not (?:able|capable|qualified|allowed|permitted|a (?:doctor|radiologist|physician|medical)))\b",
    r"\b(?:i|we) (?:\w+ )?(?:cannot|will not|must decline|do not feel comfortable|do not have the (?:ability|capability|capacity)|do not have access)\b",
    r"\b(?:i|we) do not (?:see|find) (?:an|any|the) (?:\w+ ){0,2}(?:image|picture|attachment)\b|\bno image (?:was|is|has been)\b",
    r"\b(?:i'm|i am) sorry, (?:but )?\b|\b(?:i'd|i would) (?:have|need) to decline\b|\b(?:i|we) (?:am|are|'m|'re) not a substitute\b",
)


class Reading(NamedTuple):
    """What a text says of one finding: value 1 positive, 0 negative, -1 uncertain; `sentence` is the one that decided it."""

    value: int
    sentence: str


class _Event(NamedTuple):
    start: int
    end: int
    kind: str
    findings: tuple
